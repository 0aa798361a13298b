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
from dataclasses import replace
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.facts import Unavailable
from doctor.core.messages import _, plural
from doctor.core.recipe import Recipe
from doctor.core.records import CALIBRATION
from doctor.edits.decoding import decoded
from doctor.fixing.outputs import check_output
from doctor.fixing.proof import Proof
from doctor.fixing.staging import hold_output
from doctor.formats.known import streams
from doctor.lint.engine import load_rules, locate, select_rules
from doctor.model.quantization_config import holds_quantized
from doctor.model.spec import build_spec
from doctor.plan.mixture import with_mixture
from doctor.quant import preflight as flight
from doctor.quant.allocation import run as allocation
from doctor.quant.allocation.budget import Budget
from doctor.quant.allocation.ladder import ladder
from doctor.quant.allocation.run import Diverge, Mixing
from doctor.quant.calibration.rows import MAX_SEQ_LENGTH, ROWS, SAMPLED_SHARE, NotSampled
from doctor.quant.calibration.self_generated import forecast
from doctor.quant.client import Client
from doctor.quant.container import prepared, require_importance
from doctor.quant.device import device_memory, device_of
from doctor.quant.distributed import size, start, stop
from doctor.quant.duration import steps
from doctor.quant.earlier import Earlier, open_earlier, source_mark
from doctor.quant.early import errors_of_headers, require_named, require_nothing_to_fix
from doctor.quant.ending import Compare
from doctor.quant.execute import build
from doctor.quant.preflight import Forecast
from doctor.quant.prepare import Asked, Calibrated, Checked, calibrate, check, judged, report_of
from doctor.quant.quantize_result import QuantizeResult
from doctor.quant.rates import measured
from doctor.quant.stage import require_no_work
from doctor.quant.tuning.wanted import AUTO, OFF, refuse_tuning, require_text, wanted
from doctor.quant.tuning.wanted import forecast as tuning_forecast


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
    device: str = "auto",
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    progress: Callable[[str], None] = lambda text: None,
    preflight: bool = False,
    prove: Callable[[Checkpoint, Checkpoint], Proof] | None = None,
    client: Client | None = None,
    imatrix: str | os.PathLike | None = None,
    budget: Budget | None = None,
    diverge: Diverge | None = None,
    tune: str | int = AUTO,
    retry_failed: bool = False,
    compare: Compare | None = None,
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

    retry_failed: `output` is the finished one of a run of the same inputs, but for rows and damping. Only its linears
    that fell back are solved again; the new output, whose other tensors are the same to the byte, takes its place.

    imatrix: the file that the importance of columns goes to, as llama-quantize reads it; only for formats of GGUF.

    budget: bits a weight, or bytes, that the output may take: single linears get other bits than the rest, chosen by
    what each width does to the next token (allocation/). Of the mixture and the model of one width of that size, the
    one that is closer to the original is written. diverge: what measures that; doctor.api passes it.

    tune: rows to tune scales and norm gains on after the last layer (tuning/within.py); "off" for none; "auto" a
    share of the calibration rows, where the format has such scales and there is text and memory enough.

    compare: what compares the output with the original once it is there, on rows that did not calibrate it; its
    findings are reported, and the output stays. doctor.api passes it. None compares nothing.

    preflight: check and calibrate, quantize the first and the last decoder layer only, write nothing: the result has
    a forecast.

    Raises PlanRefused (output or plan), NotQuantizable (numbers), BadCheckpoint, MachineError; then there is no output.
    """
    device = device_of(device)
    if size() > 1 and int(os.environ["RANK"]):
        progress = _silent
    recipe = recipe or Recipe()
    require_importance(recipe, imatrix)
    if retry_failed and isinstance(tune, int):
        raise PlanRefused(
            _("--tune {rows} with --retry-failed: it changes what is to stay.", rows=tune),
            _("Tune the output afterwards: `doctor tune`."),
        )
    refuse_tuning(tune, recipe, rows)
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
        OFF if retry_failed else tune,
        retry_failed,
        compare,
    )
    if size() > 1 and retry_failed:
        raise PlanRefused(_("--retry-failed: is done by one process; there are {n}.", n=size()), _("Omit torchrun."))
    if size() > 1 and streams(asked.recipe):
        raise PlanRefused(
            _("{n} processes: weights of this recipe are rounded as they are read, in one process.", n=size()),
            _("Start it without torchrun."),
        )
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    check_output(source, asked.output, overwrite or retry_failed)
    require_nothing_to_fix(source, fix or bool(unsafe_fixes))
    view = decoded(source)[0] if source.gguf else source
    asked = replace(asked, recipe=prepared(view, asked.recipe))
    plain = replace(asked.recipe, bits_for=recipe.bits_for)  # without the mixture of fixed rules that GGUF brings
    mixing = (
        _mixing(replace(asked, recipe=plain), view, budget, diverge)
        if budget is not None and diverge is not None
        else None
    )
    if mixing is not None:
        asked = replace(asked, recipe=mixing.steps.provisional)
    writes = not preflight and not (size() > 1 and int(os.environ["RANK"]))  # under torchrun, rank 0 writes
    with ExitStack() as stack:
        for note in stack.enter_context(hold_output(asked.output)) if writes else ():
            progress(note)
        if writes and not (resume or retry_failed):
            require_no_work(asked.output)
        return _quantized(asked, source, fix, unsafe_fixes, calibration, rows, max_seq_length, preflight, mixing)


def _mixing(asked: Asked, source: Checkpoint, budget: Budget, diverge: Diverge) -> Mixing:
    """What the budget can buy, from headers. Raises DoctorError where that is nothing, PlanRefused for a run of several
    processes, or one that was interrupted.
    """
    if asked.resume or size() > 1:
        what = "torchrun" if size() > 1 else "--resume"
        raise PlanRefused(
            _("--bpw with {what}: a mixture is made by one process, in one run.", what=what),
            _("Name a file by --measurement: what was measured is kept there for the next run."),
        )
    config = source.value("config.json")
    if config is None:
        raise BadCheckpoint(_without_config(source))
    steps = ladder(source, build_spec(config, source.tensors), asked.recipe, budget)
    return allocation.prepare(source, steps, budget, diverge)


def _quantized(
    asked: Asked,
    source: Checkpoint,
    fix: bool,
    unsafe_fixes: bool | Iterable[str],
    calibration: str | os.PathLike | None,
    rows: int,
    max_seq_length: int,
    preflight: bool,
    mixing: Mixing | None,
) -> QuantizeResult:
    """Check, calibrate, run, finish; the caller holds the output."""
    checked = check(asked, source, fix or bool(unsafe_fixes), unsafe_fixes)
    report = report_of(asked, checked)
    if not report.ok:
        asked.progress(plural("not quantized: {n:,} error", "not quantized: {n:,} errors", report.count("error")))
        return QuantizeResult(report)
    earlier = _earlier(asked, checked) if asked.retry else None
    with device_memory(asked.device):
        calibrated = calibrate(asked, checked, calibration, rows, max_seq_length)
        require_text(tune=asked.tune, facts=calibrated.facts)
        report = report_of(asked, calibrated.checked, calibrated.facts)
        if not report.ok:
            return QuantizeResult(report, calibration=calibrated.facts)
        checked.assessment.checkpoint.forget_parsed()
        if preflight:
            return _preflight(asked, calibrated)
        if mixing is not None:
            client = replace(asked.client, rehearse=None) if asked.client else None  # which the mixture has had

            def again(recipe: Recipe) -> Checked:
                now = replace(asked, recipe=recipe, client=client)
                found = check(now, source, fix or bool(unsafe_fixes), unsafe_fixes)
                if calibrated.facts is not None:
                    found.assessment.store.put(CALIBRATION, calibrated.facts)
                return judged(asked, found)

            return allocation.quantize_mixed(asked, calibrated, mixing, again)
        ranks = start(asked.device)
        try:
            return build(asked, calibrated, ranks, earlier=earlier).commit(asked.overwrite or asked.retry)
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
    budget: Budget | None = None,
    tune: str | int = AUTO,
    device: str = "auto",
    compare_rows: int = 0,
    fixed: bool = False,
) -> Forecast:
    """Memory, disk and time of quantizing, from headers and from rates that this machine is measured at in two seconds;
    path may be org/name on the Hub. What rules find in the headers that would end the run is among the problems, but
    where the run is asked for fixes (`fixed`), which may cure it.

    calibration is not opened, but without one the model writes a part of the rows, for which it is held whole.
    compare_rows: on which the output will be compared. Raises BadCheckpoint.
    """
    checkpoint = source = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    asked = recipe or Recipe()
    if type(checkpoint) is Checkpoint and holds_quantized(checkpoint):
        with suppress(Unavailable):
            checkpoint = decoded(checkpoint)[0]
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(_without_config(checkpoint))
    if not checkpoint.tensors:
        raise BadCheckpoint(_("{root}: no tensor can be read.", root=str(checkpoint.root)), _("Run `doctor check`."))
    spec = build_spec(config, checkpoint.tensors)
    require_named(checkpoint, spec, recipe or Recipe())
    length = min(max_seq_length, spec.max_positions or max_seq_length)
    recipe = recipe or Recipe()
    recipe = ladder(checkpoint, spec, recipe, budget).provisional if budget else with_mixture(recipe, spec)
    sampled = None
    if calibration is None and recipe.calibrated and rows >= SAMPLED_SHARE:
        with suppress(NotSampled):
            sampled = forecast(checkpoint, spec, rows // SAMPLED_SHARE, length, memory=memory)
    wish = wanted(tune, recipe, spec, rows, length)
    tuning = tuning_forecast(tune, checkpoint, spec, recipe, rows, length, memory)
    place = Path(os.path.abspath(output))
    found = flight.plan(checkpoint, spec, recipe, place, rows, length, memory, sampled.bytes if sampled else 0, tuning)
    if found.problems:  # it would not run
        return found
    if not fixed and (wrong := errors_of_headers(source, asked)):
        return replace(found, problems=wrong)
    timed = steps(
        spec,
        recipe,
        measured(checkpoint, spec, recipe, place, sampled.pieces if sampled else 0, device_of(device)),
        source=checkpoint.total_bytes,
        output=found.need.output,
        rows=found.rows,
        length=length,
        sampled=sampled.pieces * sampled.size if sampled else 0,
        trained=tuning.rows,
        through=wish.through,
        a_step=wish.a_step,
        compared=compare_rows,
    )
    return replace(found, steps=timed, seconds=sum(step.seconds for step in timed))


def _without_config(checkpoint: Checkpoint) -> str:
    return _("{root}: config.json is absent or broken; quantizing needs the model's shape.", root=str(checkpoint.root))


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
    report = report_of(asked, checked, calibrated.facts, done, new, {"preflight": list(found.tried)})
    return QuantizeResult(report, None, calibrated.facts, [*checked.notes, *calibrated.notes], found)


def _earlier(asked: Asked, checked: Checked) -> Earlier:
    """The run whose failed linears are solved again. Raises PlanRefused."""
    earlier = open_earlier(Checkpoint.open(asked.output), checked.recipe, source_mark(checked.assessment.checkpoint))
    asked.progress(earlier.note)
    return earlier
