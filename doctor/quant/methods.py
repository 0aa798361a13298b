"""What the quantization methods need from a run, as data: calibration rows, and whether scales are folded into a
layer first.

The solvers themselves are in solve/; linear.py maps a method's name to its solver. No torch here: forecasts read this
too.
"""

from __future__ import annotations

from dataclasses import dataclass

from doctor.core.recipe import Recipe


@dataclass(frozen=True)
class Method:
    """calibrated: solves on calibration rows. folds_scales: all Hessians of a layer are held at once, for scales
    folded before solving.

    low_precision: a GPU may compute layers in bfloat16; what AWQ folds needs the digits of float32.
    """

    name: str
    calibrated: bool = True
    folds_scales: bool = False
    low_precision: bool = False


_METHODS = {
    method.name: method
    for method in (
        Method("gptq", low_precision=True),
        Method("awq", folds_scales=True),
        Method("rtn", calibrated=False),
    )
}
SOLVED = tuple(name for name, method in _METHODS.items() if method.calibrated)  # outcomes that have a measured loss


def method_of(recipe: Recipe) -> Method:
    """The recipe's method. Raises KeyError for a name that core/recipe.py does not allow."""
    return _METHODS[recipe.method]
