"""Several recipes tried on a few layers of a model: what each loses, weighs and takes, before hours go into one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.from_json import read_document
from doctor.core.messages import collected
from doctor.core.methods import METHODS
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.quant.quantize_result import QuantizeResult

SCHEMA = "doctor.sweep/1"


@dataclass(frozen=True)
class Trial:
    """What a preflight of one recipe gave. Errors are shares of the energy of what a linear computes, of its weights
    where the recipe takes no calibration; NaN where nothing was quantized. problem: why a run would fail; "" where it
    would not.
    """

    name: str
    plan: str
    calibrated: bool
    error: float  # median of the linears
    worst: float
    worst_linear: str
    bytes: int
    bits: float  # a weight, everything stored counted
    seconds: float  # of a whole run
    memory: int  # at the peak, bytes
    findings: tuple[str, ...]  # codes of warnings and errors
    problem: str = ""


@dataclass(frozen=True)
class Sweep:
    """Trials in the order of the list."""

    checkpoint: str
    parameters: int
    layers: tuple[int, ...]  # that were tried
    trials: list[Trial]
    version: str = __version__

    @property
    def ok(self) -> bool:
        """Whether a recipe would work."""
        return any(not trial.problem for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The least error among those that would work; of outputs, where a recipe's were measured: an error of weights
        alone is another figure.
        """
        sound = [t for t in self.trials if not t.problem and math.isfinite(t.error)]
        sound = [t for t in sound if t.calibrated] or sound
        return min(sound, key=lambda t: t.error, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        data = asdict(self)
        return {"schema": SCHEMA, "messages": collected(data), **data}


def from_dict(document: dict[str, Any]) -> Sweep:
    """The Sweep of a document that `doctor quantize --preflight --recipes FILE -f json` wrote. Raises DoctorError for
    what is none.
    """
    return read_document(Sweep, document, SCHEMA)


def sweep(
    checkpoint: Checkpoint,
    recipes: Sequence[tuple[str, Recipe]],
    run: Callable[[Recipe], QuantizeResult],
) -> Sweep:
    """Try each (name, recipe). run: a preflight of one recipe. A recipe that is refused has its reason in its row."""
    weights = sum(info.numel for info in checkpoint.tensors.values())
    trials: list[Trial] = []
    layers: set[int] = set()
    for name, recipe in recipes:
        try:
            result = run(recipe)
        except DoctorError as error:
            nothing = (math.nan, math.nan, "", 0, math.nan, math.nan, 0, ())
            trials.append(
                Trial(name, recipe.label(), METHODS[recipe.method].calibrated, *nothing, problem=error.message)
            )
            continue
        layers.update(result.forecast.tried if result.forecast else ())
        trials.append(_trial(name, recipe, result, weights))
    return Sweep(checkpoint.name, weights, tuple(sorted(layers)), trials)


def _trial(name: str, recipe: Recipe, result: QuantizeResult, weights: int) -> Trial:
    solved = [(x["solve"]["loss"], x["name"]) for x in result.linears if x.get("outcome") not in ("kept", "failed")]
    worst, linear = max(solved, default=(math.nan, ""), key=lambda x: (not math.isfinite(x[0]), x[0]))
    forecast, report = result.forecast, result.report
    wrong = [f for f in report.findings if f.severity != "info"]
    errors = [f.message for f in report.failing]
    problem = next(iter([*(forecast.problems if forecast else ()), *errors]), "")
    output = forecast.need.output if forecast else 0
    return Trial(
        name,
        recipe.label(),
        METHODS[recipe.method].calibrated,
        statistics.median(loss for loss, _name in solved) if solved else math.nan,
        worst,
        linear,
        output,
        8 * output / max(weights, 1) if output else math.nan,
        forecast.seconds if forecast and forecast.seconds is not None else math.nan,
        forecast.peak if forecast else 0,
        tuple(dict.fromkeys(f.code for f in wrong)),
        problem,
    )
