"""The middle of `doctor quantize`: the layers, then the check of the output, up to a staged directory that is whole.

The caller decides whether it is committed: a mixture of widths is compared with the uniform model first.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from doctor.checkpoint.directory import Checkpoint
from doctor.core.messages import _, listed, plural
from doctor.core.records import CalibrationFacts, TuningFacts
from doctor.edits.gguf_floats import opened_from
from doctor.fixing.assess import assess
from doctor.fixing.loading import judged_proof
from doctor.fixing.output_summary import files, receipt_summary
from doctor.formats.known import streams
from doctor.lint.engine import Report
from doctor.quant import export
from doctor.quant.client import Linears
from doctor.quant.distributed import Ranks
from doctor.quant.earlier import Earlier, source_mark
from doctor.quant.ending import Ending
from doctor.quant.forewarn import forewarn
from doctor.quant.gguf_output import write_imatrix
from doctor.quant.job import Result, run
from doctor.quant.prepare import Asked, Calibrated, Checked, judged, report_of
from doctor.quant.quantize_result import QuantizeResult
from doctor.quant.receipt import receipt
from doctor.quant.resume import fingerprint
from doctor.quant.setup import Survey
from doctor.quant.stage import damage_note
from doctor.quant.stream.choose import choose
from doctor.quant.stream.run import run as stream
from doctor.quant.tuning.within import state_of, tuned, tuning_notes, tuning_shown
from doctor.quant.vision import vision_linears

_RESUME = _("Finished layers are kept: run again with --resume, and with --tune off or more --memory.")
_OMIT = _("Leave --tune out, or run `doctor tune` on the output.")


@dataclass
class Built:
    """A run that is not committed yet. staged: the whole output; None where a finding of the report forbids it.
    calibrated, done: what the layers were given, and what they gave.
    """

    report: Report
    staged: export.Output | None
    calibration: CalibrationFacts | None
    notes: list[str]
    ending: Ending | None = None
    calibrated: Calibrated | None = None
    done: Result | None = None

    def commit(self, overwrite: bool) -> QuantizeResult:
        """The output in its place, where there is one, and then compared with its original."""
        if self.staged is None or self.ending is None:
            return QuantizeResult(self.report, None, self.calibration, self.notes)
        report = self.ending.figures(self.report, self.staged.stage, self.notes)
        place = self.staged.commit(overwrite)
        report = self.ending.compared(report, place, self.notes)
        return QuantizeResult(report, place, self.calibration, self.notes)


def build(
    asked: Asked, calibrated: Calibrated, ranks: Ranks, survey: Survey | None = None, earlier: Earlier | None = None
) -> Built:
    """The layers, then the check of the output. survey: sees every linear on its way. earlier: the run whose failed
    linears alone are solved.
    """
    started = time.perf_counter()
    checked = calibrated.checked
    notes = [*checked.notes, *calibrated.notes, *forewarn(asked, calibrated)]
    notes += [earlier.note] if earlier else []
    staged = _stage(asked, calibrated, ranks, earlier)
    streamed = streams(checked.recipe)
    linears = _linears(asked, checked) if streamed or checked.recipe.vision else None
    done, kept = (
        _streamed(asked, calibrated, staged, linears or {})
        if streamed
        else run(
            checked.assessment.checkpoint,
            checked.spec,
            checked.recipe,
            calibrated.rows,
            staged,
            checked.assessment.store,
            asked.rules,
            memory=asked.memory,
            progress=asked.progress,
            device=asked.device,
            ranks=ranks,
            consent=checked.consent,
            survey=survey,
            vision=vision_linears(checked.recipe, linears or {}, checked.assessment.checkpoint.tensors),
            earlier=earlier,
        )
    )
    notes += [_("fix: {title}", title=fixed) for fixed in done.fixes]
    checked = judged(asked, replace(checked, recipe=done.recipe))
    report = report_of(asked, checked, calibrated.facts, done)
    if done.stopped or not report.ok or not ranks.is_rank0:
        staged.discard()
        return Built(report, None, calibrated.facts, notes)
    outcomes = listed(f"{done.count(kind)} {kind}" for kind in sorted({r["outcome"] for r in done.records}))
    asked.progress(
        _("quantize: {outcomes} ({seconds:.1f} s)", outcomes=outcomes, seconds=time.perf_counter() - started)
    )
    found = _linears(asked, checked) if linears is None else linears
    return _finish(asked, replace(calibrated, checked=checked), staged, done, kept, notes, found, not streamed)


def _linears(asked: Asked, checked: Checked) -> Linears:
    """What the client says of its linears; {} where nobody is asked."""
    source = checked.assessment.checkpoint
    modules = [name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")]
    return asked.client.linears(opened_from(source), modules) if asked.client else {}


def _streamed(
    asked: Asked, calibrated: Calibrated, staged: export.Output, linears: Linears
) -> tuple[Result, list[str]]:
    """(what was done, names that the output's config lists as 16 bits) of rounding shard after shard."""
    checked = calibrated.checked
    source, store = checked.assessment.checkpoint, checked.assessment.store
    chosen = choose(source, checked.spec, checked.recipe, linears, store)
    done = stream(chosen, checked.recipe, staged, store, asked.rules, asked.progress)
    return done, list(chosen.names)


def _stage(asked: Asked, calibrated: Calibrated, ranks: Ranks, earlier: Earlier | None) -> export.Output:
    """The staging directory: rank 0 opens it, the others read it."""
    checked, sample = calibrated.checked, calibrated.sample
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(checked.assessment.checkpoint, checked.recipe, calibrated.rows, asked.device)
    mark |= {"retry": earlier.digest} if earlier else {}
    staged = None
    if ranks.is_rank0:
        staged = export.Output.open(asked.output, {**mark, "ranks": ranks.size}, resume=asked.resume or asked.retry)
        if sample and sample.said is not None and not any("sampled" in entry for entry in staged.notes()):
            staged.note({"sampled": sample.said})
        for name in staged.damaged:
            asked.progress(damage_note(name))
    ranks.barrier()
    staged = staged or export.ReadOnlyOutput(asked.output)
    ranks.barrier()
    return staged


def _finish(
    asked: Asked,
    calibrated: Calibrated,
    staged: export.Output,
    done: Result,
    kept: list[str],
    notes: list[str],
    linears: Linears,
    join: bool,
) -> Built:
    """Tune and write, and read back under all rules; what has an error is gone."""
    started = time.perf_counter()
    checked, facts = calibrated.checked, calibrated.facts
    source = checked.assessment.checkpoint
    if asked.imatrix and facts:
        write_imatrix(asked.imatrix, staged.parts(), source.value("config.json") or {}, facts.tokens, facts.source)
    parts = partial(staged.as_checkpoint, source, checked.recipe, kept, linears)
    values, tuning = tuned(asked, calibrated, parts, _RESUME, partial(state_of, staged))
    _tell_time(asked, tuning, started)
    notes += tuning_notes(tuning)
    document = receipt(source_mark(source), checked.recipe, facts, done, notes)
    staged.finish(source, checked.recipe, kept, document, linears, join, values)
    return _read_back(asked, calibrated, staged, done, notes, tuning)


def tune_finished(built: Built, tune: str | int) -> Built:
    """A run that was finished without tuning, tuned as `tune` says and judged again."""
    staged, calibrated, started = built.staged, built.calibrated, time.perf_counter()
    assert staged and calibrated and built.ending and built.done
    asked = replace(built.ending.asked, tune=tune)
    values, tuning = tuned(asked, calibrated, lambda: nullcontext(Checkpoint.open(staged.stage)), _OMIT)
    if tuning is None:
        return built
    _tell_time(asked, tuning, started)
    notes = [*built.notes, *tuning_notes(tuning)]
    staged.add_to_receipt({"notes": notes})
    if not values:
        report = replace(built.report, extra={**built.report.extra, **tuning_shown(tuning)})
        return replace(built, report=report, notes=notes)
    staged.change(values)
    return _read_back(asked, calibrated, staged, built.done, notes, tuning)


def _tell_time(asked: Asked, tuning: TuningFacts | None, started: float) -> None:
    if tuning is not None and not tuning.reason:
        asked.progress(
            _("tune: {rows} rows ({seconds:.1f} s)", rows=tuning.rows, seconds=time.perf_counter() - started)
        )


def _read_back(
    asked: Asked,
    calibrated: Calibrated,
    staged: export.Output,
    done: Result,
    notes: list[str],
    tuning: TuningFacts | None,
) -> Built:
    """Judge what was written under all rules, and let the client load it; what has an error is gone."""
    started = time.perf_counter()
    checked, facts = calibrated.checked, calibrated.facts
    written = Checkpoint.open(staged.stage)
    after = assess(written, replace(checked.recipe, goal=""), asked.rules)
    before = {(f.code, f.message) for f in checked.assessment.findings}
    new = [f for f in after.findings if (f.code, f.message) not in before]
    shown = {"files": files(written), "receipt": receipt_summary(written), **tuning_shown(tuning)}
    report = report_of(asked, checked, facts, done, new, shown)
    asked.progress(
        _(
            "check after: {errors} ({seconds:.1f} s)",
            errors=plural("{n:,} error", "{n:,} errors", report.count("error")),
            seconds=time.perf_counter() - started,
        )
    )
    if not report.ok:
        staged.discard()
        return Built(report, None, facts, notes)
    if asked.client:
        proof = asked.client.prove(after.checkpoint.root)
        loaded, note = judged_proof(proof, after.store, asked.rules)
        if proof.reason:
            notes.append(note)
            shown["not_proved"] = note
        else:
            asked.progress(note)
        report = report_of(asked, checked, facts, done, [*new, *loaded], shown)
    return Built(report, staged, facts, notes, Ending(asked, checked, facts), calibrated, done)
