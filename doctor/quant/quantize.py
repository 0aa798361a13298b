"""The whole job of `doctor quantize`: check, fix through a view, calibrate, run block by block, check the output,
commit.

Rules judge at every step, in one store: what the files say, what calibration and the run measured. Nothing is written
where the check before finds an error, and nothing is committed where the check after finds one.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.facts import CHECKPOINT
from doctor.core.finding import Finding
from doctor.core.host import describe
from doctor.core.recipe import Recipe
from doctor.core.records import CalibrationFacts
from doctor.fixing.plan import Consent, Look, look, make_plan, refuse
from doctor.fixing.staging import check_output
from doctor.lint.engine import Report, judge, load_rules, locate, select_rules
from doctor.lint.rule import Rule
from doctor.model.spec import build_spec
from doctor.quant import budget, export
from doctor.quant import preflight as flight
from doctor.quant.calibration.rows import MAX_SEQ_LENGTH, ROWS, SAMPLED_SHARE, NotSampled, calibration_rows
from doctor.quant.calibration.self_generated import Once, forecast, sampler, unable
from doctor.quant.capacity import measure
from doctor.quant.device import device_free, device_memory, device_of
from doctor.quant.distributed import Ranks, size, start, stop
from doctor.quant.job import Result, computing_dtype, computing_note, fingerprint, receipt, run
from doctor.quant.preflight import Forecast
from doctor.quant.solve import cpu
from doctor.report.figures import files
from doctor.report.figures import receipt as picture_receipt
from doctor.scan.summary import summary


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
) -> QuantizeResult:
    """Quantize a 16-bit checkpoint into `output`, which is whole or absent; the source is never written to.

    calibration: .txt, .jsonl, .parquet or a Hub dataset; None takes text that Python brings along and text sampled from
    the model. rows rows of max_seq_length tokens, fewer where text or positions end. fix: safe fixes first (and those
    of unsafe_fixes), read through, never written. keep: patterns of linears left in 16 bits. memory: bytes that the
    process may take (budget.py); what can be on disk goes there above it. resume: go on where an interrupted run of the
    same inputs stopped. progress gets a line for each step.

    preflight: check and calibrate, quantize the first and the last block only, write nothing: the result has a
    forecast.

    Raises PlanRefused (output or plan), NotQuantizable (numbers), BadCheckpoint, MachineError; then there is no output.
    """
    device = device_of(device)
    if size() > 1 and int(os.environ["RANK"]):
        progress = _silent
    job = _Job(recipe or Recipe(), output, select_rules(load_rules(rules_dirs), select, ignore), fail_on, progress)
    job.overwrite = overwrite
    job.recipe = replace(job.recipe, keep=(*job.recipe.keep, *keep), seed=job.recipe.seed if seed is None else seed)
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    check_output(source, job.output, overwrite)
    job.check_before(source, fix, unsafe_fixes)
    if not job.report().ok:
        job.progress(f"not quantized: {job.report().count('error')} errors")
        return QuantizeResult(job.report())
    with device_memory(device):
        chosen = job.calibrate(calibration, rows, max_seq_length, memory, device, resume)
        if not job.report().ok:
            return QuantizeResult(job.report(), calibration=job.facts)
        job.seen.checkpoint.forget_parsed()
        if preflight:
            return job.preflight(chosen, memory, device)
        job.ranks = start(device)
        try:
            return job.quantize(chosen, memory, resume, device)
        finally:
            stop(job.ranks)


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
    """Memory and disk of quantizing, from headers alone; path may be org/name on the Hub. calibration is not opened,
    but without one the model writes a part of the rows, for which it is held whole. Raises BadCheckpoint.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(f"{checkpoint.root}: config.json is absent or broken; quantizing needs the model's shape.")
    spec = build_spec(config, checkpoint.tensors)
    length, recipe = min(max_seq_length, spec.max_positions or max_seq_length), recipe or Recipe()
    sampling = 0
    if calibration is None and recipe.method != "rtn" and rows >= SAMPLED_SHARE:
        with suppress(NotSampled):
            sampling = forecast(checkpoint, spec, rows // SAMPLED_SHARE, length, memory=memory).bytes
    return flight.plan(checkpoint, spec, recipe, Path(os.path.abspath(output)), rows, length, memory, sampling)


def _silent(text: str) -> None:
    """What every rank but the first says."""


class _Job:
    def __init__(
        self,
        recipe: Recipe,
        output: str | os.PathLike,
        rules: list[Rule],
        fail_on: str,
        progress: Callable[[str], None],
    ):
        self.started = time.perf_counter()
        self.recipe, self.rules, self.fail_on, self.progress = recipe, rules, fail_on, progress
        self.output = Path(os.path.abspath(output))
        self.overwrite = False
        self.ranks = Ranks()
        self.consent: Consent | None = None  # what fixes may be made, None: none
        self.seen: Look | None = None
        self.facts: CalibrationFacts | None = None
        self.sample: Once | None = None
        self.notes: list[str] = []
        self.linears: list[dict] = []
        self.after: list[Finding] = []
        self.made: dict = {}  # files and receipt of the output, for the report

    def check_before(self, source: Checkpoint, fix: bool, unsafe_fixes: bool | Iterable[str]) -> None:
        """Judge the source, or what fixes make of it; `seen` is what will be quantized."""
        started = time.perf_counter()
        if not fix:
            self.seen = look(source, self.recipe, self.rules)
        else:
            codes = set() if isinstance(unsafe_fixes, bool) else set(unsafe_fixes)
            self.consent = Consent(unsafe_fixes is True or "all" in codes, frozenset(codes - {"all"}), recipe=True)
            plan = make_plan(source, self.recipe, self.rules, self.consent)
            refuse(plan)
            if plan.needs_proof:
                from doctor.evaluate.proof import prove

                refuse(plan, [prove(plan.unpadded(), plan.view)])
            self.recipe, self.seen = plan.recipe, plan.after
            for step in plan.steps:
                self._note(f"fix: {step.code} {step.title}")
        if self.seen.store.has(CHECKPOINT, "spec"):
            room = measure(self.seen.checkpoint, self.seen.store.get(CHECKPOINT, "spec"), self.recipe, self.output)
            self.seen.store.put(CHECKPOINT, "given_machine", room)
            self._judge()
        counts = ", ".join(f"{self.report().count(s)} {s}s" for s in ("error", "warning"))
        self.progress(f"check before: {counts} ({time.perf_counter() - started:.1f} s)")

    def calibrate(
        self, source: str | os.PathLike | None, rows: int, length: int, memory: int | None, device: str, resume: bool
    ) -> list[list[int]]:
        if self.recipe.method == "rtn":
            return []
        started = time.perf_counter()
        spec = self.seen.store.get(CHECKPOINT, "spec")
        sample = (
            partial(unable, "several processes would each have to hold it")
            if size() > 1
            else sampler(
                self.seen.checkpoint,
                spec,
                seed=self.recipe.seed,
                memory=memory,
                device=device,
                dtype=computing_dtype(self.seen.checkpoint, spec, self.recipe, device),
            )
        )
        left = export.left_by(self.output) if resume else []
        self.sample = Once(sample, next((entry["sampled"] for entry in left if "sampled" in entry), None))
        chosen, self.facts, notes = calibration_rows(
            self.seen.checkpoint,
            source,
            rows=rows,
            length=length,
            seed=self.recipe.seed,
            vocab=spec.vocab,
            max_positions=spec.max_positions,
            sample=self.sample,
        )
        for note in notes:
            self._note(f"calibration: {note}")
        self.seen.store.put(CHECKPOINT, "calibration", self.facts)
        self._judge()
        self.progress(
            f"calibrate: {self.facts.rows} rows, {self.facts.tokens:,} tokens of {self.facts.source} "
            f"({time.perf_counter() - started:.1f} s)"
        )
        return chosen

    def preflight(self, rows: list[list[int]], memory: int | None, device: str) -> QuantizeResult:
        """Two blocks and a forecast. Checking the output takes about what checking the source took, hence twice."""
        checkpoint, store = self.seen.checkpoint, self.seen.store
        around = 2 * (time.perf_counter() - self.started)
        forecast, done = flight.preflight(
            checkpoint,
            store.get(CHECKPOINT, "spec"),
            self.recipe,
            self.output,
            rows,
            store,
            self.rules,
            memory=memory,
            device=device,
            around=around,
            progress=self.progress,
        )
        self.linears = done.records
        known = {(f.code, f.message) for f in self.seen.findings}
        self.seen.findings = [
            *self.seen.findings,
            *locate([f for f in done.judged if (f.code, f.message) not in known], checkpoint),
        ]
        forecast.problems += [f.message for f in done.stopped]
        return QuantizeResult(self.report(), calibration=self.facts, notes=self.notes, forecast=forecast)

    def quantize(self, rows: list[list[int]], memory: int | None, resume: bool, device: str) -> QuantizeResult:
        started = time.perf_counter()
        checkpoint, store = self.seen.checkpoint, self.seen.store
        if "config.json" not in checkpoint.json:
            raise DoctorError(
                f"{checkpoint.root}: has no config.json; quantizing needs the model's shape.",
                "Give the checkpoint's directory.",
            )
        spec = store.get(CHECKPOINT, "spec")
        for note in (cpu.note(device), computing_note(checkpoint, spec, self.recipe, device)):
            if note:
                self._note(note)
        need = budget.needs(checkpoint, spec, self.recipe, len(rows), max(map(len, rows), default=0))
        budget.require(need, memory)
        free = device_free(device)
        if free is not None:
            self.progress(
                f"{device}: up to {need.on_device / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are free"
                f"{'' if need.on_device <= free else ': it may run out of memory; finished blocks are kept for --resume'}"
            )
        self.output.parent.mkdir(parents=True, exist_ok=True)
        mark = {**fingerprint(checkpoint, self.recipe, rows, device), "ranks": self.ranks.size}
        staged = export.Output.open(self.output, mark, resume=resume) if self.ranks.speaks else None
        if (
            staged
            and self.sample
            and self.sample.said is not None
            and not any("sampled" in entry for entry in staged.notes())
        ):
            staged.note({"sampled": self.sample.said})
        self.ranks.wait()
        staged = staged or export.Watched(self.output)
        self.ranks.wait()
        done = run(
            checkpoint,
            spec,
            self.recipe,
            rows,
            staged,
            store,
            self.rules,
            memory=memory,
            progress=self.progress,
            device=device,
            ranks=self.ranks,
            consent=self.consent,
        )
        self.linears, self.recipe = done.records, done.recipe
        self.notes += [f"fix: {text}" for text in done.fixes]
        self._judge()
        if done.stopped or not self.report().ok or not self.ranks.speaks:
            staged.discard()
            return QuantizeResult(self.report(), calibration=self.facts, notes=self.notes)
        self.progress(f"quantize: {_outcomes(done)} ({time.perf_counter() - started:.1f} s)")
        return self._finish(staged, done)

    def _finish(self, staged: export.Output, done: Result) -> QuantizeResult:
        """Write, read back under all rules, and commit only if that finds no error."""
        started = time.perf_counter()
        staged.finish(self.seen.checkpoint, self.recipe, done.kept, receipt(self.recipe, self.facts, done, self.notes))
        written = Checkpoint.open(staged.stage)
        after = look(written, self.recipe, self.rules)
        self.made = {"files": files(written), "receipt": picture_receipt(written)}
        before = {(f.code, f.message) for f in self.seen.findings}
        self.after = [f for f in after.findings if (f.code, f.message) not in before]
        report = self.report()
        self.progress(f"check after: {report.count('error')} errors ({time.perf_counter() - started:.1f} s)")
        if not report.ok:
            staged.discard()
            return QuantizeResult(report, calibration=self.facts, notes=self.notes)
        return QuantizeResult(report, staged.commit(self.overwrite), self.facts, self.notes)

    def _judge(self) -> None:
        """All rules on everything known so far; facts that were judged before cost nothing."""
        findings, self.seen.runs = judge(self.seen.store, self.rules)
        self.seen.findings = locate(findings, self.seen.checkpoint)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress(text)

    def report(self) -> Report:
        seen = self.seen
        return Report(
            checkpoint=seen.checkpoint.name,
            recipe=self.recipe,
            findings=[*seen.findings, *self.after],
            runs=list(seen.runs),
            summary=summary(seen.checkpoint, seen.store),
            skipped_tensors=seen.skipped,
            bytes_read=seen.bytes_known,
            seconds=time.perf_counter() - self.started,
            fail_on=self.fail_on,
            linears=self.linears,
            extra={"machine": describe(), **({"calibration": asdict(self.facts)} if self.facts else {}), **self.made},
        )


def _outcomes(done: Result) -> str:
    kinds = sorted({r["outcome"] for r in done.records})
    return ", ".join(f"{done.count(kind)} {kind}" for kind in kinds)
