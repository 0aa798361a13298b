"""Tuning as the last step of `doctor quantize`: the finished parts against the model that they were made from.

The rows that are trained on are some of the calibration rows; those that are watched lie between them in the same text
(of ready rows of ids: behind them), so what is reported was measured on tokens that neither calibrated nor trained.
Where none are left, some of the calibration rows are watched and not trained on, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, NotQuantizable
from doctor.core.messages import Message, _
from doctor.core.records import TuningFacts
from doctor.quant import budget
from doctor.quant.block_change import NewValue
from doctor.quant.calibration.unseen import unseen_rows
from doctor.quant.device import device_free
from doctor.quant.export import Output
from doctor.quant.prepare import Asked, Calibrated
from doctor.quant.stage import TUNING
from doctor.quant.tuning.saved import Saved
from doctor.quant.tuning.tune import tuned_values
from doctor.quant.tuning.wanted import LENGTH, WATCHED, Wanted, need, short, wanted

Opens = Callable[[], AbstractContextManager[Checkpoint]]


def tuned(
    asked: Asked, calibrated: Calibrated, opens: Opens, without: Message, state: Callable[[int], Saved] | None = None
) -> tuple[dict[str, NewValue], TuningFacts | None]:
    """(new values of scales and gains, what was done) of finished layers, which `opens` gives as a checkpoint: {} where
    tuning does not help, None where there is nothing to say. state: where a run on so many rows keeps its own.

    Raises MachineError and NotQuantizable where rows were asked for and cannot be trained on, with the hint `without`.
    """
    checked, facts, rows = calibrated.checked, calibrated.facts, calibrated.rows
    source, spec, recipe = checked.assessment.checkpoint, checked.spec, checked.recipe
    length = max(map(len, rows), default=0)
    wish = (
        Wanted(0)
        if facts is None
        else wanted(asked.tune, recipe, spec, len(rows), length, facts.tokens, facts.seen_rows)
    )
    if not (wish.rows or wish.reason):
        return {}, None
    if not wish.rows:
        return {}, TuningFacts(reason=wish.reason)
    budget.give_back()
    takes = need(source, spec, recipe, wish.rows, length)
    limit = device_free(asked.device) or budget.limit(asked.memory)
    if takes > limit:
        if wish.asked:
            raise MachineError(short(wish.rows, takes, limit), without)
        return {}, TuningFacts(
            reason=_("it takes {need}, {limit} may be used", need=budget.gib(takes), limit=budget.gib(limit))
        )
    watched = unseen_rows(
        source,
        calibrated.source,
        calibrated.packed,
        count=WATCHED,
        length=calibrated.length,
        seed=recipe.seed,
        known=rows,
    )
    try:
        with opens() as parts:
            found = tuned_values(
                parts,
                source,
                [rows[i * len(rows) // wish.rows][:LENGTH] for i in range(wish.rows)],
                passes=1 if watched else None,
                seed=recipe.seed,
                memory=limit - takes,
                device=asked.device,
                say=asked.progress,
                unseen=[row[:LENGTH] for row in watched],
                saved=state(wish.rows) if state else None,
                through=wish.through,
                a_step=wish.a_step,
            )
    except NotQuantizable as error:
        if wish.asked:
            raise NotQuantizable(error.message, without) from error
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


def state_of(staged: Output, rows: int) -> Saved:
    """Where a run keeps the state of its tuning with so many rows."""
    told = [e for e in staged.notes() if e.get("tuning") == TUNING and e.get("rows") == rows]
    digest = told[-1].get("sha256") if told else None
    return Saved(staged.stage / TUNING, lambda entry: staged.note({**entry, "rows": rows}), digest)
