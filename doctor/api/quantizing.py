"""What writes weights anew: `quantize` and its forecast, `convert`, `tune`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from doctor.api.clients import client, prove_logits
from doctor.api.measuring import verify
from doctor.checkpoint.directory import Checkpoint
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.lint.engine import load_rules

if TYPE_CHECKING:
    from doctor.core.options import ConvertOptions, PlanOptions, QuantizeOptions, TuneOptions
    from doctor.quant.convert import Converted
    from doctor.quant.preflight import Forecast
    from doctor.quant.quantize_result import QuantizeResult
    from doctor.quant.sweep import Sweep
    from doctor.quant.tuning.tune import Tuned


def quantize(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    compare_rows: int = 0,
    **options: Unpack[QuantizeOptions],
) -> QuantizeResult:
    """Quantize a 16-bit checkpoint into `output`; see doctor.quant.quantize.quantize for the options.

    What headers refuse is raised, or returned as a report of them, before torch is imported. compare_rows: rows of 512
    tokens, that calibrated nothing, to compare the output on; 0 for none.
    """
    from doctor.quant.early import refused_by_headers
    from doctor.quant.quantize_result import QuantizeResult
    from doctor.quant.stage import refuse_output

    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    refuse_output(source, output, **options)
    refused = refused_by_headers(source, output, recipe or Recipe(), **options)
    if refused is not None:
        return QuantizeResult(refused)
    from doctor.evaluate.divergence import divergence
    from doctor.quant.device import device_of
    from doctor.quant.quantize import quantize as run

    device = device_of(options.get("device", "auto"))
    options = {"prove": prove_logits, "client": client(recipe), **options}
    options.setdefault("diverge", partial(divergence, device=device))
    if compare_rows and os.environ.get("WORLD_SIZE", "1") == "1":
        measured = partial(verify, rows=compare_rows, memory=0, load_proof=False, device=device)
        options.setdefault("compare", partial(measured, progress=partial(_tell, options.get("progress"))))
    return run(source, output, recipe, **options)


def _tell(say: Callable[[str], None] | None, phase: str, done: int, total: int) -> None:
    if say is not None:
        say(_("{phase}: {done} of {total}", phase=phase, done=done, total=total))


def plan_quantize(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    **options: Unpack[PlanOptions],
) -> Forecast:
    """Forecast memory and disk of quantizing, from headers alone; see doctor.quant.quantize.plan for the options."""
    from doctor.quant.quantize import plan

    return plan(path, output, recipe, **options)


def try_recipes(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    recipes: Sequence[tuple[str, Recipe]],
    **options: Unpack[QuantizeOptions],
) -> Sweep:
    """A preflight of each (name, recipe): errors on a few layers, size and time; nothing is written to `output`."""
    from doctor.quant.calibration.documents import require_text_of
    from doctor.quant.sweep import sweep

    require_text_of(options.get("calibration"))
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    options["preflight"] = True
    return sweep(source, recipes, lambda recipe: quantize(source, output, recipe, **options))


def convert(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    target: str,
    **options: Unpack[ConvertOptions],
) -> Converted:
    """Write a quantized checkpoint in another stored format, or as 16-bit floats; see doctor.quant.convert.convert."""
    from doctor.quant.convert import convert as run

    options.setdefault("client", client())
    return run(path, output, target, **options)


def tune(
    quantized: str | os.PathLike[str] | Checkpoint,
    original: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    **options: Unpack[TuneOptions],
) -> Tuned:
    """Tune the scales and norms of a quantized checkpoint against its original; see doctor.quant.tuning.tune.tune."""
    from doctor.quant.calibration.documents import require_text_of
    from doctor.quant.early import require_tunable

    source, teacher = (x if isinstance(x, Checkpoint) else Checkpoint.open(x) for x in (quantized, original))
    rules = load_rules(dict.fromkeys(options.get("rules_dirs", ())))
    require_tunable(source, teacher, Path(os.path.abspath(output)), rules, options.get("overwrite", False))
    require_text_of(options.get("calibration"))
    from doctor.quant.tuning.tune import tune as run

    options.setdefault("client", client())
    return run(source, teacher, output, **options)
