"""The end of a run: what its output takes now, how far it is from its original, and its card."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import _
from doctor.core.records import ORIGINAL_BROKEN, CalibrationFacts
from doctor.edits.gguf_floats import GgufAsFloats, opened_from
from doctor.fixing.filesystem import machine_errors
from doctor.lint.engine import Report
from doctor.quant.budget import constant, gib
from doctor.quant.card import CARD, card
from doctor.quant.prepare import Asked, Checked

Compare = Callable[[Path, Path], Report]  # (original, what was written) -> a report as doctor.evaluate.verify makes it
TOKENS = 512  # of a row that is compared
_LAYER = re.compile(r".*?\.\d+\.")
_BESIDE = f".{CARD}.tmp"  # where a card is written before it takes its name
_SHOWN = ("comparison", "own_measure", "text")  # of its figures


@dataclass(frozen=True)
class Ending:
    """The end of one run: figures and card while the output is staged, the comparison once it is in its place, since
    that takes as long as two passes of a model and a run that is killed meanwhile must not lose its layers.
    """

    asked: Asked
    checked: Checked
    facts: CalibrationFacts | None

    def figures(self, report: Report, stage: Path, notes: list[str]) -> Report:
        """The report with the sizes of what is staged, whose card is written with them."""
        source = self.checked.assessment.checkpoint
        report = replace(report, extra={**report.extra, "run": run_figures(source, Checkpoint.open(stage))})
        self._write_card(report, stage, notes)
        return report

    def compared(self, report: Report, output: Path, notes: list[str]) -> Report:
        """The report with a comparison of the output, whose card is written again with it; as it is, where nothing
        compares.
        """
        if self.asked.compare is None:
            return report
        source = self.checked.assessment.checkpoint
        report = _compared(self.asked, self.asked.compare, self.checked, report, output, source, notes)
        try:
            self._write_card(report, output, notes)
        except MachineError as error:  # the output is whole, and its card says all but this
            (output / _BESIDE).unlink(missing_ok=True)
            note = _("the card does not hold the comparison: {reason}", reason=error.message)
            notes.append(note)
            self.asked.progress(note)
        return report

    def _write_card(self, report: Report, folder: Path, notes: list[str]) -> None:
        """README.md, the old one or the new one at any time."""
        text = card(self.checked.assessment.checkpoint, self.checked.recipe, self.facts, report, notes)
        beside = folder / _BESIDE
        with machine_errors(folder / CARD):
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, folder / CARD)


def run_figures(source: Checkpoint, written: Checkpoint) -> dict[str, Any]:
    """{source_bytes, output_bytes, bits, peak_bytes}: bytes of tensors before and after, bits a weight, and the most
    memory that this process held.
    """
    stored = source.source if isinstance(source, GgufAsFloats) else source
    before = stored.total_bytes
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


def _not_compared(asked: Asked, report: Report, notes: list[str], note: str) -> Report:
    """The report, which says so."""
    notes.append(note)
    asked.progress(note)
    return replace(report, extra={**report.extra, "not_compared": note})


def _compared(
    asked: Asked,
    compare: Compare,
    checked: Checked,
    report: Report,
    output: Path,
    source: Checkpoint,
    notes: list[str],
) -> Report:
    """The report with a comparison, or a note of why there is none: the output is good all the same."""
    if checked.consent is not None and checked.notes:
        note = _(
            "not compared with the original, which was read through fixes; `doctor verify` compares two directories"
        )
        return _not_compared(asked, report, notes, note)
    need, most = comparing_bytes(source, checked.spec.vocab or 0), asked.memory
    if most is not None and need > most:
        note = _(
            "not compared with the original: that takes up to {need}, --memory is {most}",
            need=gib(need),
            most=gib(most),
        )
        return _not_compared(asked, report, notes, note)
    try:
        found = compare(Path(os.path.abspath(opened_from(source))), output)
    except DoctorError as error:
        note = _("not compared with the original: {reason}", reason=error.message)
        return _not_compared(asked, report, notes, note)
    broken = next((f for f in found.findings if f.code == ORIGINAL_BROKEN), None)
    if broken is not None:  # no fault of the quantization, and no figure means anything then
        note = _("not compared with the original: {reason}", reason=broken.message)
        return _not_compared(asked, report, notes, note)
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
