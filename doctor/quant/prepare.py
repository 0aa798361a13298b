"""The steps of `doctor quantize` before the run: judge the source, or what fixes make of it, then choose calibration
rows.

Records: Asked (what the user asked for), Checked (the judged source), Calibrated (with rows of token ids).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.facts import CHECKPOINT
from doctor.core.finding import Finding
from doctor.core.host import describe
from doctor.core.machine import GIVEN_MACHINE
from doctor.core.messages import _, plural
from doctor.core.recipe import Recipe
from doctor.core.records import CALIBRATION, CalibrationFacts
from doctor.core.rehearsal import GIVEN_REHEARSAL
from doctor.edits.gguf_floats import opened_from
from doctor.fixing.assess import Assessment, assess
from doctor.fixing.consent import Consent
from doctor.fixing.plan import make_plan, refuse
from doctor.fixing.proof import Proof
from doctor.lint.as_floats import read_as_floats
from doctor.lint.engine import Report, judge, locate
from doctor.lint.rule import Rule
from doctor.model.spec import ModelSpec
from doctor.quant.calibration.rows import calibration_rows
from doctor.quant.calibration.self_generated import Once, sampler, unable
from doctor.quant.capacity import measure
from doctor.quant.client import Client
from doctor.quant.distributed import size
from doctor.quant.job import Result
from doctor.quant.setup import Progress, computing_dtype
from doctor.quant.stage import left_by
from doctor.scan.header import DECODED, SPEC
from doctor.scan.summary import summary

DECODING = "C147"  # its fix decodes what is quantized, which a plan to quantize does unasked


@dataclass(frozen=True)
class Asked:
    """What the user asked for. memory: bytes, None for a share of what is free. started: the clock at the start."""

    recipe: Recipe
    output: Path
    rules: list[Rule]
    fail_on: str
    overwrite: bool
    resume: bool
    memory: int | None
    device: str
    progress: Progress
    prove: Callable[[Checkpoint, Checkpoint], Proof] | None  # that fixes of tensors leave the logits as they are
    client: Client | None  # who will read the output; None asks nobody
    started: float
    imatrix: Path | None = None  # where the importance of columns goes
    tune: str | int = "off"  # rows to tune scales and gains on; auto, off
    retry: bool = False  # of what is in `output` only the linears that fell back are solved
    # compares the original with the output, on rows that calibrated nothing
    compare: Callable[[Path, Path], Report] | None = None


@dataclass(frozen=True)
class Checked:
    """The source, or what fixes make of it, judged. consent: what fixes may be made, None: none. notes: for the
    receipt.
    """

    assessment: Assessment
    recipe: Recipe
    consent: Consent | None
    notes: tuple[str, ...]

    @property
    def spec(self) -> ModelSpec:
        """Raises KeyError where the config gives no model."""
        spec = self.assessment.store.get(SPEC)
        assert isinstance(spec, ModelSpec)
        return spec


@dataclass(frozen=True)
class Calibrated:
    """Rows of token ids, [] for a method that takes none, and the facts about them. sample: what the model wrote of
    them. source, length, packed: where they come from, the tokens that each was to have, and how many were cut from
    that text.
    """

    checked: Checked
    rows: list[list[int]]
    facts: CalibrationFacts | None = None
    sample: Once | None = None
    notes: tuple[str, ...] = ()
    source: str | os.PathLike | None = None
    length: int = 0
    packed: int = 0


def check(asked: Asked, source: Checkpoint, fix: bool, unsafe_fixes: bool | Iterable[str]) -> Checked:
    """Judge the source, or what fixes make of it, and this machine against what the run takes."""
    started = time.perf_counter()
    checked = _fixed(asked, source, unsafe_fixes) if fix else _plain(asked, source)
    store = checked.assessment.store
    if store.has(SPEC):
        machine = measure(checked.assessment.checkpoint, checked.spec, checked.recipe, asked.output)
        store.put(GIVEN_MACHINE, machine)
        checked = judged(asked, checked)
        rehearse = asked.client.rehearse if asked.client else None
        if rehearse and not fix and size() == 1 and report_of(asked, checked).ok:
            store.put(GIVEN_REHEARSAL, rehearse(opened_from(source), checked.recipe))
            checked = judged(asked, checked)
    report = report_of(asked, checked)
    asked.progress(
        _(
            "check before: {errors}, {warnings} ({seconds:.1f} s)",
            errors=plural("{n:,} error", "{n:,} errors", report.count("error")),
            warnings=plural("{n:,} warning", "{n:,} warnings", report.count("warning")),
            seconds=time.perf_counter() - started,
        )
    )
    return checked


def _plain(asked: Asked, source: Checkpoint) -> Checked:
    """The source as it is, or decoded while it is read where it is quantized."""
    view, how = read_as_floats(source, asked.recipe, asked.rules)
    if how is None:
        return Checked(assess(source, asked.recipe, asked.rules), asked.recipe, None, ())
    facts = [(CHECKPOINT, DECODED.name, how)]
    note = _("source: {n:,} weights in {label} are decoded as they are read", n=len(how.stored), label=how.label)
    notes = (*((note,) if how.stored else ()), *how.notes)
    for text in notes:
        asked.progress(text)
    return Checked(assess(view, asked.recipe, asked.rules, facts=facts), asked.recipe, None, notes)


def _fixed(asked: Asked, source: Checkpoint, unsafe_fixes: bool | Iterable[str]) -> Checked:
    """The source seen through its fixes. Raises PlanRefused where they conflict, or change what the model computes."""
    codes = set() if isinstance(unsafe_fixes, bool) else set(unsafe_fixes)
    if read_as_floats(source, asked.recipe, asked.rules)[1] is not None:
        codes.add(DECODING)
    consent = Consent(unsafe_fixes is True or "all" in codes, frozenset(codes - {"all"}), recipe=True)
    fixes = make_plan(source, asked.recipe, asked.rules, consent)
    refuse(fixes)
    if fixes.needs_proof:
        if asked.prove is None:
            raise DoctorError(
                _("fixes that change tensors need a proof that the logits stay; none was given."),
                _("Use doctor.api.quantize."),
            )
        refuse(fixes, [asked.prove(fixes.unpadded(), fixes.overlay)])
    notes = tuple(_("fix: {title}", title=_("{code} {title}", code=s.code, title=s.title)) for s in fixes.steps)
    for note in notes:
        asked.progress(note)
    return Checked(fixes.after, fixes.recipe, consent, notes)


def calibrate(asked: Asked, checked: Checked, source: str | os.PathLike | None, rows: int, length: int) -> Calibrated:
    """CalibrationFacts rows, judged."""
    if not checked.recipe.calibrated:
        return Calibrated(checked, [])
    started = time.perf_counter()
    checkpoint, spec = checked.assessment.checkpoint, checked.spec
    left = left_by(asked.output) if asked.resume else []
    sample = Once(_sampler(asked, checked), next((entry["sampled"] for entry in left if "sampled" in entry), None))
    chosen, facts, remarks = calibration_rows(
        checkpoint,
        source,
        rows=rows,
        length=length,
        seed=checked.recipe.seed,
        vocab=spec.vocab,
        max_positions=spec.max_positions,
        sample=sample,
    )
    notes = tuple(_("calibration: {text}", text=remark) for remark in remarks)
    for note in notes:
        asked.progress(note)
    checked.assessment.store.put(CALIBRATION, facts)
    checked = judged(asked, checked)
    asked.progress(
        _(
            "calibrate: {rows} rows, {tokens:,} tokens of {source} ({seconds:.1f} s)",
            rows=facts.rows,
            tokens=facts.tokens,
            source=facts.source,
            seconds=time.perf_counter() - started,
        )
    )
    length = min(length, checked.spec.max_positions or length)
    packed = 0 if facts.seen_rows else facts.rows - facts.sampled_rows
    return Calibrated(checked, chosen, facts, sample, notes, source, length, packed)


def _sampler(asked: Asked, checked: Checked) -> Callable:
    """What lets the model write calibration text, or says why it cannot."""
    if size() > 1:
        return partial(unable, _("several processes would each have to hold it"))
    checkpoint, spec = checked.assessment.checkpoint, checked.spec
    return sampler(
        checkpoint,
        spec,
        seed=checked.recipe.seed,
        memory=asked.memory,
        device=asked.device,
        dtype=computing_dtype(checkpoint, spec, checked.recipe, asked.device),
    )


def judged(asked: Asked, checked: Checked) -> Checked:
    """All rules on everything known so far; facts that were judged before cost nothing."""
    findings, runs = judge(checked.assessment.store, asked.rules)
    seen = replace(checked.assessment, findings=locate(findings, checked.assessment.checkpoint), runs=runs)
    return replace(checked, assessment=seen)


def report_of(
    asked: Asked,
    checked: Checked,
    facts: CalibrationFacts | None = None,
    done: Result | None = None,
    new: Iterable[Finding] = (),
    shown: dict | None = None,
) -> Report:
    """The report so far. new: findings after those of the assessment; shown: files and receipt of the output."""
    seen = checked.assessment
    return Report(
        checkpoint=seen.checkpoint.name,
        recipe=checked.recipe,
        findings=[*seen.findings, *new],
        runs=list(seen.runs),
        summary=summary(seen.checkpoint, seen.store),
        skipped_tensors=seen.skipped,
        bytes_read=seen.bytes_known,
        seconds=time.perf_counter() - asked.started,
        fail_on=asked.fail_on,
        linears=list(done.records) if done else [],
        extra={"machine": describe(), **({"calibration": asdict(facts)} if facts else {}), **(shown or {})},
    )
