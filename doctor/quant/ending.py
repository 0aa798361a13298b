"""The end of a run, before the output appears: what it takes now, how far it is from its original, and its card."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.records import CalibrationFacts
from doctor.lint.engine import Report
from doctor.quant.budget import constant, gib
from doctor.quant.card import CARD, card
from doctor.quant.export import Output
from doctor.quant.prepare import Asked, Checked

Compare = Callable[[Path, Path], Report]  # (original, what was written) -> a report as doctor.evaluate.verify makes it
ORIGINAL_BROKEN = "O606"
TOKENS = 512  # of a row that is compared
_LAYER = re.compile(r".*?\.\d+\.")
_SHOWN = ("comparison", "own_measure", "text")  # of its figures


def ending(
    asked: Asked,
    checked: Checked,
    facts: CalibrationFacts | None,
    report: Report,
    staged: Output,
    notes: list[str],
) -> Report:
    """The report with the figures of the output that is staged, whose card is written with them."""
    source, written = checked.assessment.checkpoint, Checkpoint.open(staged.stage)
    report = replace(report, extra={**report.extra, "run": run_figures(source, written)})
    if asked.compare is not None:
        report = _compared(asked, asked.compare, checked, report, staged.stage, source, notes)
    text = card(source, checked.recipe, facts, report, notes)
    (staged.stage / CARD).write_text(text, encoding="utf-8")
    return report


def run_figures(source: Checkpoint, written: Checkpoint) -> dict[str, Any]:
    """{source_bytes, output_bytes, bits, peak_bytes}: bytes of tensors before and after, bits a weight, and the most
    memory that this process held.
    """
    before = sum(info.nbytes for info in source.tensors.values())
    weights = sum(info.numel for info in source.tensors.values())
    after = (
        sum(file.size for file in written.gguf[0].files)
        if written.gguf
        else sum(info.nbytes for info in written.tensors.values())
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux
    return {
        "source_bytes": before,
        "output_bytes": after,
        "bits": 8 * after / max(weights, 1),
        "peak_bytes": peak,
    }


def comparing_bytes(source: Checkpoint, vocab: int) -> int:
    """What a comparison holds at its peak, from above: a decoder layer and what lies outside the layers in float32, and
    the logits of one row of both models.
    """
    layers: dict[str, int] = {}
    outside = 0
    for name, info in source.tensors.items():
        layer = _LAYER.match(name)
        if layer is None:
            outside += info.numel
        else:
            layers[layer[0]] = layers.get(layer[0], 0) + info.numel
    return constant() + 4 * (max(layers.values(), default=0) + outside + 4 * TOKENS * vocab)


def _compared(
    asked: Asked,
    compare: Compare,
    checked: Checked,
    report: Report,
    stage: Path,
    source: Checkpoint,
    notes: list[str],
) -> Report:
    """The report with a comparison, or a note of why there is none: the output is good all the same."""
    if checked.consent is not None and checked.notes:
        note = _(
            "not compared with the original, which was read through fixes; `doctor verify` compares two directories"
        )
        notes.append(note)
        asked.progress(note)
        return report
    need, most = comparing_bytes(source, checked.spec.vocab or 0), asked.memory
    if most is not None and need > most:
        note = _(
            "not compared with the original: that takes up to {need}, --memory is {most}",
            need=gib(need),
            most=gib(most),
        )
        notes.append(note)
        asked.progress(note)
        return report
    try:
        found = compare(Path(os.path.abspath(source.root)), stage)
    except DoctorError as error:
        note = _("not compared with the original: {reason}", reason=error.message)
        notes.append(note)
        asked.progress(note)
        return report
    broken = next((f for f in found.findings if f.code == ORIGINAL_BROKEN), None)
    if broken is not None:  # no fault of the quantization, and no figure means anything then
        note = _("not compared with the original: {reason}", reason=broken.message)
        notes.append(note)
        asked.progress(note)
        return report
    known = {(f.code, f.message) for f in report.findings}
    runs = {run.rule.code: run for run in found.runs if run.rule.cost == "output"}
    return replace(
        report,
        findings=[
            *report.findings,
            *(f for f in found.findings if f.code in runs and (f.code, f.message) not in known),
        ],
        runs=[runs.get(run.rule.code, run) for run in report.runs],
        extra={**report.extra, **{key: found.extra[key] for key in _SHOWN if key in found.extra}},
    )
