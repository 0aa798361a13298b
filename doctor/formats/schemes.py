"""Named schemes: the words in which people ask for weights, activations and groups together, as fields of a recipe.

The names are those of llm-compressor, compressed-tensors and llama.cpp, so what people know from there means the same
here. A row gives what the name fixes; a recipe may differ in the method where the row has several, and in group_size
where the row leaves it open. Flags that contradict a row are refused before anything is read.

Source: vllm-project/compressed-tensors 0.20 quantization/quant_scheme.py (PRESET_SCHEMES).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from doctor.core.errors import DoctorError
from doctor.core.messages import _, listed
from doctor.core.methods import METHODS
from doctor.core.named_schemes import NAMED
from doctor.core.recipe import Recipe


@dataclass(frozen=True)
class NamedScheme:
    """One name. methods: that can choose its codes, the usual one first. fields: fields of the recipe that it fixes.
    usual: fields that it proposes, and that flags may set otherwise.
    """

    name: str
    methods: tuple[str, ...]
    fields: Mapping[str, Any]
    usual: Mapping[str, Any] = field(default_factory=dict)


def _packed(name: str, bits: int, activations: str = "") -> NamedScheme:
    fields = {"bits": bits, "format": "compressed-tensors", "activations": activations}
    return NamedScheme(name, ("gptq", "rtn"), fields, {"group_size": 128, "sym": True})


def _fixed(
    name: str, methods: tuple[str, ...], bits: int, group_size: int, form: str, activations: str = ""
) -> NamedScheme:
    fields = {"bits": bits, "group_size": group_size, "sym": True, "format": form, "activations": activations}
    return NamedScheme(name, methods, fields)


def _gguf(name: str, bits: int, form: str = "gguf") -> NamedScheme:
    return NamedScheme(name, ("gptq", "rtn"), {"bits": bits, "group_size": 32, "sym": False, "format": form})


SCHEMES: dict[str, NamedScheme] = {
    row.name: row
    for row in (
        _fixed("FP8_DYNAMIC", ("rtn",), 8, -1, "float-quantized", "fp8"),
        _fixed("FP8_STATIC", ("rtn",), 8, -1, "float-quantized", "fp8-static"),
        _fixed("FP8_BLOCK", ("rtn",), 8, 128, "float-quantized", "fp8-block"),
        _fixed("INT8", ("rtn", "gptq"), 8, -1, "int-quantized", "int8"),
        _packed("W2A16", 2),
        _packed("W3A16", 3),
        _packed("W4A16", 4),
        _packed("W5A16", 5),
        _packed("W6A16", 6),
        _packed("W7A16", 7),
        _packed("W8A16", 8),
        _packed("W4AFP8", 4, "fp8"),
        _fixed("NVFP4A16", ("gptq", "rtn"), 4, 16, "nvfp4-pack-quantized"),
        _fixed("NVFP4", ("gptq", "rtn"), 4, 16, "nvfp4-pack-quantized", "fp4"),
        _fixed("MXFP4A16", ("gptq", "rtn"), 4, 32, "mxfp4-pack-quantized"),
        _fixed("MXFP4", ("gptq", "rtn"), 4, 32, "mxfp4-pack-quantized", "mxfp4"),
        _fixed("MXFP8A16", ("rtn",), 8, 32, "mxfp8-quantized"),
        _fixed("MXFP8", ("rtn",), 8, 32, "mxfp8-quantized", "mxfp8"),
        _gguf("Q4_K_M", 4),
        _gguf("Q5_K_M", 5),
        _gguf("Q6_K", 6),
        _gguf("Q8_0", 8),
        _gguf("Q4_0", 4, "gguf-q4_0"),
        NamedScheme("EXL2", ("gptq", "rtn"), {"sym": True, "format": "exl2"}, {"bits": 4, "group_size": 128}),
        _gguf("IQ4_XS", 4, "gguf-iq4_xs"),
    )
}
NAMED.update(SCHEMES)
ALIASES = {"W8A8": "INT8", "FP8": "FP8_STATIC"}  # other tools' names for what a row is


def scheme_named(text: str) -> NamedScheme:
    """The row of a name, in any case and with - for _. Raises DoctorError that gives the nearest names."""
    name = text.strip().upper().replace("-", "_")
    name = ALIASES.get(name, name)
    if name in SCHEMES:
        return SCHEMES[name]
    near = get_close_matches(name, SCHEMES, n=3, cutoff=0.5)
    raise DoctorError(
        _("scheme {text!r} is not known; must be one of {names}.", text=text, names=", ".join(SCHEMES)),
        _("Did you mean {near}?", near=listed(near)) if near else "",
    )


def integer_bits(text: str) -> int:
    """The bits of a scheme of integers in groups beside 16-bit activations: what a mixture of widths is made of.

    Raises DoctorError for another scheme.
    """
    row = scheme_named(text)
    if row.fields.get("format") != "compressed-tensors" or row.fields.get("activations"):
        known = [name for name, other in SCHEMES.items() if other.usual and not other.fields["activations"]]
        raise DoctorError(
            _("--schemes {name}: must be among {known}.", name=row.name, known=", ".join(known)),
            _("Other schemes have no linears of different widths."),
        )
    return int(row.fields["bits"])


def name_of(recipe: Recipe) -> str:
    """The name whose row fixes all of this recipe, for formats that only --scheme and --format ask for; ""
    where there is none.
    """
    if recipe.format in ("", METHODS[recipe.method].format, "compressed-tensors"):
        return ""
    rows = (row for row in SCHEMES.values() if recipe.method in row.methods)
    return next((row.name for row in rows if all(getattr(recipe, k) == v for k, v in row.fields.items())), "")


def with_others(name: str, recipe: Recipe) -> str:
    """`NVFP4A16 + FP8_DYNAMIC`: the name of a recipe with those of the schemes that single linears have."""
    return " + ".join([name, *dict.fromkeys(text.rpartition("=")[2] for text in recipe.schemes_for)])


def fields_of(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the recipe of a named scheme. given: fields that the user set.

    Raises DoctorError where one of them contradicts the name.
    """
    row = scheme_named(text)
    for name, value in given.items():
        if name == "method" and value not in row.methods:
            must = _("one of {names}", names=", ".join(row.methods)) if len(row.methods) > 1 else row.methods[0]
            raise _contradiction(row, "--for", value, must)
        if name in row.fields and value != row.fields[name]:
            raise _contradiction(row, _FLAGS.get(name, name), value, row.fields[name])
    return {"method": row.methods[0], **row.usual, **row.fields, **given}


_FLAGS = {"bits": "--bits", "group_size": "--group-size", "sym": "--sym/--asym", "format": "--format"}


def _contradiction(row: NamedScheme, flag: str, value: Any, must: Any) -> DoctorError:
    return DoctorError(
        _(
            "--scheme {name} with {flag} {value}: the scheme has {must} there.",
            name=row.name,
            flag=flag,
            value=value,
            must=must,
        ),
        _("Leave {flag} out, or name the recipe by flags alone.", flag=flag),
    )
