"""Quantizing under a budget: measure, choose, quantize as one width and as a mixture, keep the better of the two.

The run of one width is no detour. Its Hessians measure what every width would do to every linear, and its output is
the guard: a prediction of the mixture's divergence is an estimate, by which single linears look better than they are,
so both models are compared with the original on rows that neither was calibrated on. The better one is tuned and
written, and both figures are reported: they are of the models before tuning, which helps either.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _, listed, plural
from doctor.core.recipe import Recipe
from doctor.core.records import ALLOCATION, Allocation, CalibrationFacts
from doctor.lint.engine import judge
from doctor.model.fused_experts import unfuse
from doctor.quant import budget as memory
from doctor.quant.allocation import saved
from doctor.quant.allocation.budget import Budget
from doctor.quant.allocation.choose import Chosen, Option, Unit, choose, hurt, total
from doctor.quant.allocation.ladder import Ladder
from doctor.quant.allocation.measure import Hurts, WidthSurvey
from doctor.quant.allocation.sensitivity import ROWS, Sensitivity
from doctor.quant.calibration.pictures import SeenRow
from doctor.quant.dequantize import as_float
from doctor.quant.distributed import Ranks
from doctor.quant.execute import Built, build, tune_finished
from doctor.quant.forward.hidden_states import make_batches
from doctor.quant.prepare import Asked, Calibrated, Checked
from doctor.quant.quantize_result import QuantizeResult
from doctor.quant.stage import stage_of
from doctor.quant.tuning.wanted import OFF

HELD_BACK = 8  # rows, at most, and one in HELD_SHARE at most
HELD_SHARE = 8

Diverge = Callable[[Checkpoint, Path, list[torch.Tensor]], float]  # KL in nats a token of a directory on these rows
Recheck = Callable[[Recipe], Checked]


@dataclass(frozen=True)
class Mixing:
    """What is known of a mixture before any work. file: of the measurement; stated: what it must hold for; known: what
    it says, None where it is not there yet.
    """

    steps: Ladder
    diverge: Diverge
    file: Path | None
    stated: Mapping[str, Any]
    known: Mapping[str, Hurts] | None


def prepare(checkpoint: Checkpoint, steps: Ladder, budget: Budget, diverge: Diverge) -> Mixing:
    """Raises DoctorError where the measurement's file is no measurement of this checkpoint and recipe."""
    stated, file = saved.conditions(checkpoint, steps.recipe), budget.measurement
    return Mixing(steps, diverge, file, stated, saved.read(file, stated) if file and file.exists() else None)


def quantize_mixed(asked: Asked, calibrated: Calibrated, mixing: Mixing, check: Recheck) -> QuantizeResult:
    """Quantize twice and commit the better. calibrated: its source was judged for a mixture. check: judges the source
    for another recipe. Raises NotQuantizable where nothing can be held back.
    """
    calibrated, held = held_back(calibrated)
    steps, known = mixing.steps, mixing.known
    recipe = replace(calibrated.checked.recipe, bits_for=())
    steps = replace(
        steps,
        recipe=replace(recipe, bits=steps.recipe.bits, wide=steps.recipe.wide, group_size=steps.recipe.group_size),
        uniform=replace(
            recipe,
            bits=steps.uniform.bits,
            wide=steps.uniform.wide,
            group_size=steps.uniform.group_size,
            bits_for=steps.uniform.bits_for,
        ),
    )
    survey = slopes = None
    if known is None:
        slopes = _slopes(asked, calibrated)
        survey = WidthSurvey(steps.uniform, steps.recipe, _measured(steps))
    else:
        asked.progress(_("widths: as measured before, in {path}", path=str(mixing.file)))
    aside = asked.output.with_name(f"{asked.output.name}.uniform")
    shutil.rmtree(stage_of(aside), ignore_errors=True)
    one = _built(replace(asked, output=aside), calibrated, check(steps.uniform), survey)
    if one.staged is None:
        return one.commit(asked.overwrite)
    try:
        found = known if survey is None or slopes is None else survey.hurts(_harms(asked, calibrated, *slopes, one))
        assert found is not None
        if survey is not None and mixing.file:
            saved.write(mixing.file, mixing.stated, found)
        chosen = choose(_options(steps, found), steps.bits)
        asked.progress(_mixture_line(steps, chosen))
        other = _built(asked, calibrated, check(steps.recipe_of(chosen)), None)
        if other.staged is None:
            return other.commit(asked.overwrite)
        try:
            better = _better(asked, calibrated, steps, chosen, one, other, held, mixing.diverge)
            if better.staged is not other.staged:
                other.staged.discard()
                one.staged.destination = asked.output
            return better.commit(asked.overwrite)
        except BaseException:
            other.staged.discard()
            raise
    finally:
        if one.staged.stage.exists():
            one.staged.discard()


def held_back(calibrated: Calibrated) -> tuple[Calibrated, list[list[int]]]:
    """(what is left to calibrate on, rows of text alone that no run sees), the latter at equal distances."""
    rows = calibrated.rows
    text = [i for i, row in enumerate(rows) if not isinstance(row, SeenRow)]
    count = min(HELD_BACK, max(1, len(text) // HELD_SHARE))
    if len(text) < 2:
        raise NotQuantizable(
            _("--bpw: {n} calibration row; must be 2 or more, of which one is held back.", n=len(text)),
            _("Raise --rows, or give more text."),
        )
    places = {text[len(text) * (2 * i + 1) // (2 * count)] for i in range(count)}
    left = [row for i, row in enumerate(rows) if i not in places]
    facts = calibrated.facts
    if isinstance(facts, CalibrationFacts):
        facts = replace(facts, rows=len(left), tokens=sum(map(len, left)))
    return replace(calibrated, rows=left, facts=facts), [rows[i] for i in sorted(places)]


def _measured(steps: Ladder) -> tuple[float, ...]:
    """Widths to measure: those that may be chosen, and the uniform one."""
    return tuple(sorted({*steps.widths, steps.uniform.width}))


def _slopes(asked: Asked, calibrated: Calibrated) -> tuple[Sensitivity, list[torch.Tensor]]:
    """What follows slopes, and rows int64[1, length] for it. Raises NotQuantizable for a model whose slopes it cannot
    follow.
    """
    checked = calibrated.checked
    checkpoint, spec = unfuse(checked.assessment.checkpoint, checked.spec, checked.recipe)
    text = [row for row in calibrated.rows if not isinstance(row, SeenRow)]  # what images make of a row is not followed
    rows = [torch.tensor([row]) for row in text[:: max(1, len(text) // ROWS)][:ROWS]]
    found = Sensitivity(checkpoint, spec, asked.device, checked.recipe.seed)
    found.require_followed(rows[0])
    return found, rows


def _harms(
    asked: Asked, calibrated: Calibrated, found: Sensitivity, rows: list[torch.Tensor], built: Built
) -> dict[str, torch.Tensor]:
    """What the errors of a finished model cost, from as many rows at a time as memory holds beside a layer of
    errors in float32."""
    assert built.staged is not None
    checked, changed = calibrated.checked, as_float(Checkpoint.open(built.staged.stage))
    checkpoint, spec = unfuse(checked.assessment.checkpoint, checked.spec, checked.recipe)
    need = memory.needs(checkpoint, spec, checked.recipe, len(rows), max(ids.shape[1] for ids in rows))
    layers = (spec.n_layers or 0) + 1
    one = max(1, layers * need.hidden // len(rows))
    at_once = max(1, min(len(rows), max(0, memory.left(need, asked.memory) - 2 * need.ahead) // one))
    for begin in range(0, len(rows), at_once):
        found.add(rows[begin : begin + at_once], changed, asked.progress)
    return found.harms()


def _built(asked: Asked, calibrated: Calibrated, checked: Checked, survey: WidthSurvey | None) -> Built:
    return build(
        replace(asked, recipe=checked.recipe, tune=OFF),
        replace(calibrated, checked=checked),
        Ranks(),
        survey,
    )


def _options(steps: Ladder, found: Mapping[str, Hurts]) -> dict[Unit, list[Option]]:
    """Options of every unit. One whose hurt is not known at some linear keeps the uniform width."""
    options = {}
    for unit in steps.units:
        hurts = [found.get(name, {}) for name in unit]
        known = all(width in each for each in hurts for width in steps.widths)
        options[unit] = [
            Option(width, steps.size_of(unit, width), sum(each[width] for each in hurts) if known else 0.0)
            for width in (steps.widths if known else (steps.uniform.width,))
        ]
    return options


def _mixture_line(steps: Ladder, chosen: Chosen) -> str:
    counts = _counts(chosen)
    return _(
        "mixture: {bpw:.3f} bits a weight; {counts}; predicted KL {kl:.4f}",
        bpw=total(chosen) / steps.weights,
        counts=listed(
            plural("{n} linear of {bits} bits", "{n} linears of {bits} bits", n, bits=bits)
            for bits, n in counts.items()
        ),
        kl=hurt(chosen),
    )


def _counts(chosen: Chosen) -> dict[float, int]:
    """Width -> linears."""
    counts: Counter[float] = Counter()
    for unit, option in chosen.items():
        counts[option.width] += len(unit)
    return dict(sorted(counts.items()))


def _better(
    asked: Asked,
    calibrated: Calibrated,
    steps: Ladder,
    chosen: Chosen,
    one: Built,
    other: Built,
    held: list[list[int]],
    diverge: Diverge,
) -> Built:
    """The model that is closer to the original on rows that were held back; its report says what both reach."""
    assert one.staged is not None and other.staged is not None
    source = calibrated.checked.assessment.checkpoint
    rows = [ids for row in held for ids in make_batches([row], 1)]
    uniform, mixed = (diverge(source, built.staged.stage, rows) for built in (one, other) if built.staged)
    for name, kl in ((_("uniform model"), uniform), (_("mixture"), mixed)):
        if not math.isfinite(kl):
            asked.progress(_("held-back rows: the {name} gives {kl}", name=name, kl=kl))
    wins = mixed < uniform or not math.isfinite(uniform)
    fact = Allocation(
        steps.bits / steps.weights,
        total(chosen) / steps.weights,
        steps.uniform_bpw(),
        steps.uniform_name,
        _counts(chosen),
        hurt(chosen),
        mixed,
        uniform,
        sum(map(len, held)),
        "mixture" if wins else "uniform",
    )
    asked.progress(
        _(
            "held-back rows, {tokens:,} tokens: KL {mixed:.4f} of the mixture ({bpw:.3f} bits a weight), {uniform:.4f} "
            "of {name} for all ({same:.3f}): the {winner} is written",
            tokens=fact.tokens,
            mixed=mixed,
            bpw=fact.bpw,
            uniform=uniform,
            name=fact.uniform,
            same=fact.uniform_bpw,
            winner=_("mixture") if wins else _("uniform model"),
        )
    )
    built = tune_finished(other if wins else one, asked.tune)
    if built.staged is None:
        return built
    store = calibrated.checked.assessment.store
    store.put(ALLOCATION, fact)
    built.staged.add_to_receipt({"allocation": asdict(fact)})
    findings, _runs = judge(store, [rule for rule in asked.rules if ALLOCATION.name in rule.facts])
    report = replace(
        built.report,
        findings=[*built.report.findings, *findings],
        extra={**built.report.extra, "allocation": asdict(fact)},
    )
    return replace(built, report=report)
