"""The ways to choose codes, as values: what each needs, and what the rest of the program may ask about it.

A method says how codes are chosen (GPTQ, AWQ, rounding); a format (doctor/formats) says how they are stored. A method
has a format of its own, the one that is written where the recipe names none.
"""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)  # of most packed formats
GRID_BITS = (2, 3, 4, 5, 6, 7, 8)  # that a grid of integers may have
STATIC = ("fp8-static", "fp4")  # activations whose scales are measured beforehand, on calibration rows


@dataclass(frozen=True)
class Method:
    """One way to choose codes.

    calibrated: it measures each linear's inputs. factors: it needs the inverse of each linear's Hessian, float32
    [k, k]. folds_scales: it scales input channels and divides the layer before by them, so all Hessians of a decoder
    layer are held at once. low_precision: a GPU may compute layers in bfloat16; what is folded needs the digits of
    float32. bits: widths that it has, () for those of the format. sym: symmetric where the recipe does
    not say. own_widths: single linears may have other widths. proposed: formats that a fix may propose for it, () for
    any. tools: programs that quantize by it, in lower case.
    """

    name: str
    label: str
    format: str
    calibrated: bool = True
    factors: bool = False
    folds_scales: bool = False
    low_precision: bool = False
    sym: bool = True
    bits: tuple[int, ...] = ()
    own_widths: bool = True
    proposed: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


# The most exact one first: a retry may only go on to a later one.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "gptq",
            "GPTQ",
            "gptq",
            factors=True,
            low_precision=True,
            tools=("gptqmodel", "autogptq", "gptq", "exllamav2", "llmcompressor"),
        ),
        Method(
            "awq",
            "AWQ",
            "awq",
            folds_scales=True,
            sym=False,
            bits=(4,),
            own_widths=False,
            proposed=("awq",),
            tools=("autoawq", "awq", "llmcompressor"),
        ),
        Method("rtn", "RTN", "gptq", calibrated=False),
    )
}


def is_calibrated(outcome: str) -> bool:
    """Whether a linear's outcome is a method that measured its inputs: not plain rounding, not "kept", not "failed"."""
    return outcome in METHODS and METHODS[outcome].calibrated


def is_rounding(outcome: str) -> bool:
    """Whether a linear's outcome is plain rounding to nearest."""
    return outcome in METHODS and not METHODS[outcome].calibrated


def method_of_format(name: str) -> str:
    """The method whose own format this is; the first one for a format that does not say who rounded it."""
    return next((m.name for m in METHODS.values() if m.format == name), next(iter(METHODS)))
