"""Tuning as the last step of `doctor quantize`: the finished parts against the model that they were made from.

The rows that are trained on are some of the calibration rows; those that are watched lie between them in the same text,
so what is reported was measured on tokens that neither calibrated nor trained. Where the text leaves no such rows, some
of the calibration rows are watched and not trained on, and that is said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, NotQuantizable, PlanRefused
from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe, is_kept
from doctor.core.records import CalibrationFacts, TuningFacts
from doctor.formats.known import streams
from doctor.formats.registry import format_of
from doctor.model.spec import ModelSpec
from doctor.quant import budget
from doctor.quant.calibration.unseen import unseen_rows
from doctor.quant.client import Linears
from doctor.quant.device import device_free
from doctor.quant.export import Output
from doctor.quant.prepare import Asked, Calibrated
from doctor.quant.stage import TUNING
from doctor.quant.tuning.saved import Saved
from doctor.quant.tuning.train import ROWS_A_STEP, TOKENS
from doctor.quant.tuning.tune import tuned_values

AUTO, OFF = "auto", "off"
LEAST_ROWS, LEAST_TOKENS = 16, 8192  # fewer overfit
# A token takes 8 operations a weight to train on and about 3 to calibrate. Measured on SmolLM2 with 32 rows of each: 56
# s for the layers, 250 s for tuning.
SHARE = 3 / 8
WATCHED = 8  # rows between the calibration rows
_WITHOUT = _("Finished layers are kept: run again with --resume, and with --tune off or more --memory.")


@dataclass(frozen=True)
class Wanted:
    """What is asked for. rows: to train on, 0 for none; asked: they were asked for, and must be. reason: why none."""

    rows: int
    asked: bool = False
    reason: str | Message = ""


def refuse_tuning(tune: str | int, recipe: Recipe) -> None:
    """Raises PlanRefused for rows that were asked for where a recipe has no scales to tune, before any work."""
    if isinstance(tune, int) and not _has_scales(recipe):
        raise PlanRefused(
            _("--tune {rows}: {label} has no 16-bit scales of calibrated linears.", rows=tune, label=recipe.label()),
            _("GPTQ and AWQ into integer formats can be tuned; leave --tune out."),
        )


def _has_scales(recipe: Recipe) -> bool:
    """Whether a recipe gives linears that a calibrated method solved 16-bit scales of their own."""
    return recipe.calibrated and format_of(recipe).affine and not streams(recipe)


def require_text(tune: str | int, facts: CalibrationFacts | None) -> None:
    """Raises PlanRefused for rows that were asked for where images or sound calibrate, before the first layer."""
    if isinstance(tune, int) and facts and facts.seen_rows:
        raise PlanRefused(
            _("--tune {rows}: {n} rows with images or sound calibrate; must be text.", rows=tune, n=facts.seen_rows),
            _("Leave --tune out, or calibrate on text."),
        )


def wanted(tune: str | int, recipe: Recipe, rows: int, tokens: int, seen_rows: int = 0) -> Wanted:
    """How many of the calibration rows a run trains on. seen_rows: those with images or sound."""
    if tune == OFF or not _has_scales(recipe):
        return Wanted(0)
    if isinstance(tune, int):
        return Wanted(min(tune, rows), asked=True)
    if seen_rows:
        return Wanted(0, reason=_("rows with images or sound calibrated it"))
    if rows < LEAST_ROWS or tokens < LEAST_TOKENS:
        return Wanted(
            0,
            reason=_(
                "{rows} rows of {tokens:,} tokens are too few; it takes {least} rows and {enough:,} tokens",
                rows=rows,
                tokens=tokens,
                least=LEAST_ROWS,
                enough=LEAST_TOKENS,
            ),
        )
    return Wanted(min(rows, max(LEAST_ROWS, int(rows * SHARE))))


def need(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int) -> int:
    """Bytes that tuning on so many rows takes besides the codes, which are read again where memory ends."""
    hidden, vocabulary = spec.hidden or 0, spec.vocab or 0
    layers: dict[int, int] = {}
    scales = 0
    for x in (x for x in spec.linears if x.block is not None and not is_kept(recipe, x.name)):
        layers[x.block or 0] = layers.get(x.block or 0, 0) + x.in_features * x.out_features
        scales += x.out_features * max(1, x.in_features // recipe.group_size if recipe.group_size > 0 else 1)
    states = 4 * length * hidden * (2 * (rows + WATCHED) + ROWS_A_STEP * (len(layers) + 1))
    ends = 3 * 4 * vocabulary * hidden  # embedding and head in float32, and the original's until the two are compared
    sizes = budget.needs(checkpoint, spec, recipe, rows, length)
    # of a layer, in float32: weights, their slopes, and half of each for the codes; of a row: what it computes, kept
    computing = 10 * max(layers.values(), default=0) + 4 * sizes.row
    logits = 6 * 4 * TOKENS * vocabulary
    return sizes.constant + states + ends + max(computing, logits) + 7 * 4 * scales


def forecast(
    tune: str | int, checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, rows: int, length: int, memory: int | None
) -> int:
    """Bytes at the peak of the tuning of a run with these rows of text, at most; 0 where it would not be done."""
    wish = wanted(tune, recipe, rows, rows * length)
    takes = need(checkpoint, spec, recipe, wish.rows, length) if wish.rows else 0
    limit = budget.limit(memory)
    if takes > limit and not wish.asked:
        return 0
    codes = 2 * sum(x.in_features * x.out_features for x in spec.linears if not is_kept(recipe, x.name))
    return takes and max(takes, min(limit, takes + codes))


def tuned(
    asked: Asked, calibrated: Calibrated, staged: Output, kept: list[str], linears: Linears
) -> tuple[dict[str, torch.Tensor], TuningFacts | None]:
    """(new values of scales and gains, what was done) of the finished layers: {} where tuning does not help, None where
    there is nothing to say.

    Raises MachineError and NotQuantizable where rows were asked for and cannot be trained on; the layers are kept then.
    """
    checked, facts, rows = calibrated.checked, calibrated.facts, calibrated.rows
    source, spec, recipe = checked.assessment.checkpoint, checked.spec, checked.recipe
    wish = Wanted(0) if facts is None else wanted(asked.tune, recipe, len(rows), facts.tokens, facts.seen_rows)
    if not (wish.rows or wish.reason):
        return {}, None
    if not wish.rows:
        return {}, TuningFacts(reason=wish.reason)
    budget.give_back()
    takes = need(source, spec, recipe, wish.rows, max(map(len, rows)))
    limit = device_free(asked.device) or budget.limit(asked.memory)
    if takes > limit:
        short = _("it takes {need}, {limit} may be used", need=budget.gib(takes), limit=budget.gib(limit))
        if wish.asked:
            raise MachineError(_("--tune {rows}: {short}.", rows=wish.rows, short=short), _WITHOUT)
        return {}, TuningFacts(reason=short)
    watched = unseen_rows(
        source,
        calibrated.source,
        calibrated.packed,
        count=WATCHED,
        length=calibrated.length,
        seed=recipe.seed,
    )
    try:
        with staged.as_checkpoint(source, recipe, kept, linears) as parts:
            found = tuned_values(
                parts,
                source,
                [rows[i * len(rows) // wish.rows] for i in range(wish.rows)],
                passes=1 if watched else None,
                seed=recipe.seed,
                memory=limit - takes,
                device=asked.device,
                say=asked.progress,
                unseen=watched,
                saved=_state(staged, wish.rows),
            )
    except NotQuantizable as error:
        if wish.asked:
            raise NotQuantizable(error.message, _WITHOUT) from error
        return {}, TuningFacts(reason=error.message)
    return found.values, TuningFacts(
        found.trained, found.watched, bool(watched), found.steps, found.start, found.end, found.helped
    )


def tuning_notes(done: TuningFacts | None) -> list[str]:
    """What was done, for the screen and the receipt."""
    if done is None:
        return []
    if done.reason:
        return [_("scales are not tuned: {reason}", reason=done.reason)]
    rows = (
        _("{n} rows that neither calibrated nor trained", n=done.watched)
        if done.unseen
        else _("{n} calibration rows that did not train", n=done.watched)
    )
    if not done.written:
        return [
            _("scales stay as they are: tuning did not lower KL {start:.4f} on {rows}", start=done.start, rows=rows)
        ]
    return [
        _(
            "scales tuned on {trained} rows: KL {start:.4f} to {end:.4f} nats a token on {rows}",
            trained=done.rows,
            start=done.start,
            end=done.end,
            rows=rows,
        )
    ]


def tuning_shown(done: TuningFacts | None) -> dict:
    """What a report holds of it."""
    return {} if done is None else {"tuning": asdict(done)}


def _state(staged: Output, rows: int) -> Saved:
    """Where a run keeps the state of its tuning with so many rows."""
    told = [e for e in staged.notes() if e.get("tuning") == TUNING and e.get("rows") == rows]
    digest = told[-1].get("sha256") if told else None
    return Saved(staged.stage / TUNING, lambda entry: staged.note({**entry, "rows": rows}), digest)
