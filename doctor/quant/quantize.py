"""The command `doctor quantize`: check, fix through a view, calibrate, run layer by layer, check the output, commit.

Rules judge at every step, in one store: what the files say, what calibration and the run measured. Nothing is written
where the check before finds an error, and nothing is committed where the check after finds one.

A chain of values: Asked -> Checked -> Calibrated -> Result of the loop -> committed output.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.facts import Unavailable
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe
from doctor.core.records import CalibrationFacts
from doctor.edits.decoding import decoded
from doctor.fixing.assess import assess
from doctor.fixing.loading import judged_proof
from doctor.fixing.output_summary import files, receipt_summary
from doctor.fixing.outputs import check_output
from doctor.fixing.proof import Proof
from doctor.fixing.staging import hold_output
from doctor.formats.known import streams
from doctor.lint.engine import Report, load_rules, locate, select_rules
from doctor.model.quantization_config import holds_quantized
from doctor.model.spec import build_spec
from doctor.plan.mixture import with_mixture
from doctor.quant import export
from doctor.quant import preflight as flight
from doctor.quant.calibration.rows import MAX_SEQ_LENGTH, ROWS, SAMPLED_SHARE, NotSampled
from doctor.quant.calibration.self_generated import forecast
from doctor.quant.client import Client, Linears
from doctor.quant.container import prepared, require_importance
from doctor.quant.device import device_memory, device_of
from doctor.quant.distributed import Ranks, size, start, stop
from doctor.quant.forewarn import forewarn
from doctor.quant.gguf_output import write_imatrix
from doctor.quant.job import Result, run
from doctor.quant.preflight import Forecast
from doctor.quant.prepare import Asked, Calibrated, Checked, calibrate, check, judged, report_of
from doctor.quant.receipt import receipt
from doctor.quant.resume import fingerprint
from doctor.quant.stage import damage_note, require_no_work
from doctor.quant.stream.choose import choose
from doctor.quant.stream.run import run as stream


@dataclass
class QuantizeResult:
    """What a run did. output is None where nothing was written: report then holds the findings that forbade it.

    linears: one dict a linear (name, block, role, outcome, solve, hessian, seconds); the same as report.linears.
    """

    report: Report
    output: Path | None = None
    calibration: CalibrationFacts | None = None
    notes: list[str] = field(default_factory=list)
    forecast: Forecast | None = None  # of a preflight

    @property
    def linears(self) -> list[dict]:
        return self.report.linears


def quantize(
    path: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    recipe: Recipe | None = None,
    *,
    calibration: str | os.PathLike | None = None,
    rows: int = ROWS,
    max_seq_length: int = MAX_SEQ_LENGTH,
    seed: int | None = None,
    fix: bool = False,
    unsafe_fixes: bool | Iterable[str] = False,
    keep: Iterable[str] = (),
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda text: None,
    preflight: bool = False,
    prove: Callable[[Checkpoint, Checkpoint], Proof] | None = None,
    client: Client | None = None,
    imatrix: str | os.PathLike | None = None,
) -> QuantizeResult:
    """Quantize a 16-bit checkpoint into `output`, which is whole or absent; the source is never written to.

    calibration: .txt, .jsonl, .parquet or a Hub dataset; None takes text that Python brings along and text sampled
    from the model: rows rows of max_seq_length tokens, fewer where text or positions end. fix: safe fixes first (and
    those of unsafe_fixes, which imply it), read through, never written. keep: patterns of linears left in 16 bits.
    memory: bytes that the process may take (budget.py); above it, what can be on disk is spilled. resume: continue an
    interrupted run of the same inputs. progress gets a line for each step.

    prove: what proves that fixes of tensors leave the logits as they are (doctor.evaluate.proof); doctor.api passes it.
    client: the program that will read the output. It names the linears that stay plain, and loads the finished
    directory before it is committed; what it does not load whole is an error, and the output stays. None asks nobody.

    imatrix: the file that the importance of columns goes to, as llama-quantize reads it; only for formats of GGUF.

    preflight: check and calibrate, quantize the first and the last decoder layer only, write nothing: the result has
    a forecast.

    Raises PlanRefused (output or plan), NotQuantizable (numbers), BadCheckpoint, MachineError; then there is no output.
    """
    device = device_of(device)
    if size() > 1 and int(os.environ["RANK"]):
        progress = _silent
    recipe = recipe or Recipe()
    require_importance(recipe, imatrix)
    asked = Asked(
        replace(recipe, keep=(*recipe.keep, *keep), seed=recipe.seed if seed is None else seed, goal="quantize"),
        Path(os.path.abspath(output)),
        select_rules(load_rules(rules_dirs), select, ignore),
        fail_on,
        overwrite,
        resume,
        memory,
        device,
        progress,
        prove,
        client,
        time.perf_counter(),
        Path(os.path.abspath(imatrix)) if imatrix is not None else None,
    )
    if size() > 1 and streams(asked.recipe):
        raise PlanRefused(
            _("{n} processes: weights of this recipe are rounded as they are read, in one process.", n=size()),
            _("Start it without torchrun."),
        )
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    check_output(source, asked.output, overwrite)
    asked = replace(asked, recipe=prepared(source, asked.recipe))
    writes = not preflight and not (size() > 1 and int(os.environ["RANK"]))  # under torchrun, rank 0 writes
    with ExitStack() as stack:
        for note in stack.enter_context(hold_output(asked.output)) if writes else ():
            progress(note)
        if writes and not resume:
            require_no_work(asked.output)
        return _quantized(asked, source, fix, unsafe_fixes, calibration, rows, max_seq_length, preflight)


def _quantized(
    asked: Asked,
    source: Checkpoint,
    fix: bool,
    unsafe_fixes: bool | Iterable[str],
    calibration: str | os.PathLike | None,
    rows: int,
    max_seq_length: int,
    preflight: bool,
) -> QuantizeResult:
    """Check, calibrate, run, finish; the caller holds the output."""
    checked = check(asked, source, fix or bool(unsafe_fixes), unsafe_fixes)
    report = report_of(asked, checked)
    if not report.ok:
        asked.progress(_("not quantized: {errors} errors", errors=report.count("error")))
        return QuantizeResult(report)
    with device_memory(asked.device):
        calibrated = calibrate(asked, checked, calibration, rows, max_seq_length)
        report = report_of(asked, calibrated.checked, calibrated.facts)
        if not report.ok:
            return QuantizeResult(report, calibration=calibrated.facts)
        checked.assessment.checkpoint.forget_parsed()
        if preflight:
            return _preflight(asked, calibrated)
        ranks = start(asked.device)
        try:
            return _run(asked, calibrated, ranks)
        finally:
            stop(ranks)


def plan(
    path: str | os.PathLike | Checkpoint,
    output: str | os.PathLike,
    recipe: Recipe | None = None,
    *,
    rows: int = ROWS,
    max_seq_length: int = MAX_SEQ_LENGTH,
    memory: int | None = None,
    calibration: str | os.PathLike | None = None,
) -> Forecast:
    """Memory and disk of quantizing, from headers alone; path may be org/name on the Hub.

    calibration is not opened, but without one the model writes a part of the rows, for which it is held whole. Raises
    BadCheckpoint.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if type(checkpoint) is Checkpoint and holds_quantized(checkpoint):
        with suppress(Unavailable):
            checkpoint = decoded(checkpoint)[0]
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(
            _(
                "{root}: config.json is absent or broken; quantizing needs the model's shape.",
                root=str(checkpoint.root),
            )
        )
    spec = build_spec(config, checkpoint.tensors)
    length = min(max_seq_length, spec.max_positions or max_seq_length)
    recipe = with_mixture(recipe or Recipe(), spec)
    sampling = 0
    if calibration is None and recipe.calibrated and rows >= SAMPLED_SHARE:
        with suppress(NotSampled):
            sampling = forecast(checkpoint, spec, rows // SAMPLED_SHARE, length, memory=memory).bytes
    return flight.plan(checkpoint, spec, recipe, Path(os.path.abspath(output)), rows, length, memory, sampling)


def _silent(text: str) -> None:
    """No-op progress callback for ranks > 0."""


def _preflight(asked: Asked, calibrated: Calibrated) -> QuantizeResult:
    """Two layers and a forecast. Checking the output takes about what checking the source took, hence twice."""
    checked = calibrated.checked
    around = 2 * (time.perf_counter() - asked.started)
    found, done = flight.preflight(
        checked.assessment.checkpoint,
        checked.spec,
        checked.recipe,
        asked.output,
        calibrated.rows,
        checked.assessment.store,
        asked.rules,
        memory=asked.memory,
        device=asked.device,
        around=around,
        progress=asked.progress,
    )
    known = {(f.code, f.message) for f in checked.assessment.findings}
    new = locate([f for f in done.judged if (f.code, f.message) not in known], checked.assessment.checkpoint)
    report = report_of(asked, checked, calibrated.facts, done, new)
    return QuantizeResult(report, None, calibrated.facts, [*checked.notes, *calibrated.notes], found)


def _run(asked: Asked, calibrated: Calibrated, ranks: Ranks) -> QuantizeResult:
    """The layers, then the check of the output."""
    started = time.perf_counter()
    checked = calibrated.checked
    notes = [*checked.notes, *calibrated.notes, *forewarn(asked, calibrated)]
    staged = _stage(asked, calibrated, ranks)
    streamed = streams(checked.recipe)
    linears = _linears(asked, checked) if streamed else None
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
        )
    )
    notes += [_("fix: {title}", title=fixed) for fixed in done.fixes]
    checked = judged(asked, replace(checked, recipe=done.recipe))
    report = report_of(asked, checked, calibrated.facts, done)
    if done.stopped or not report.ok or not ranks.is_rank0:
        staged.discard()
        return QuantizeResult(report, None, calibrated.facts, notes)
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
    return asked.client.linears(source.root, modules) if asked.client else {}


def _streamed(
    asked: Asked, calibrated: Calibrated, staged: export.Output, linears: Linears
) -> tuple[Result, list[str]]:
    """(what was done, names that the output's config lists as 16 bits) of rounding shard after shard."""
    checked = calibrated.checked
    source, store = checked.assessment.checkpoint, checked.assessment.store
    chosen = choose(source, checked.spec, checked.recipe, linears, store)
    done = stream(chosen, checked.recipe, staged, store, asked.rules, asked.progress)
    return done, list(chosen.names)


def _stage(asked: Asked, calibrated: Calibrated, ranks: Ranks) -> export.Output:
    """The staging directory: rank 0 opens it, the others read it."""
    checked, sample = calibrated.checked, calibrated.sample
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(checked.assessment.checkpoint, checked.recipe, calibrated.rows, asked.device)
    staged = None
    if ranks.is_rank0:
        staged = export.Output.open(asked.output, {**mark, "ranks": ranks.size}, resume=asked.resume)
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
) -> QuantizeResult:
    """Write, read back under all rules, and commit only if that finds no error."""
    started = time.perf_counter()
    checked, facts = calibrated.checked, calibrated.facts
    source = checked.assessment.checkpoint
    if asked.imatrix and facts:
        write_imatrix(asked.imatrix, staged.parts(), source.value("config.json") or {}, facts.tokens, facts.source)
    staged.finish(source, checked.recipe, kept, receipt(checked.recipe, facts, done, notes), linears, join)
    written = Checkpoint.open(staged.stage)
    after = assess(written, replace(checked.recipe, goal=""), asked.rules)
    before = {(f.code, f.message) for f in checked.assessment.findings}
    new = [f for f in after.findings if (f.code, f.message) not in before]
    shown = {"files": files(written), "receipt": receipt_summary(written)}
    report = report_of(asked, checked, facts, done, new, shown)
    asked.progress(
        _(
            "check after: {errors} errors ({seconds:.1f} s)",
            errors=report.count("error"),
            seconds=time.perf_counter() - started,
        )
    )
    if not report.ok:
        staged.discard()
        return QuantizeResult(report, None, facts, notes)
    if asked.client:
        proof = asked.client.prove(after.checkpoint.root)
        loaded, note = judged_proof(proof, after.store, asked.rules)
        report = report_of(asked, checked, facts, done, [*new, *loaded], shown)
        if proof.reason:
            notes.append(note)
        else:
            asked.progress(note)
    return QuantizeResult(report, staged.commit(asked.overwrite), facts, notes)
