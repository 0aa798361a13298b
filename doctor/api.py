"""The Python doors: check, fix, quantize, verify, kvcache. The command line calls these and adds only parsing and
printing.

What only some of them need is imported where it is needed, because a check of headers alone should take no time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import HubCheckpoint, HubDonor, open_checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import CHECKPOINT, STAGES, Store, asks
from doctor.core.finding import Finding, Place
from doctor.core.recipe import Recipe
from doctor.lint.config import Config, Selection, choose
from doctor.lint.engine import Report, against, in_order, judge, load_rules, locate, select_rules
from doctor.scan.header import header_facts
from doctor.scan.summary import summary

if TYPE_CHECKING:
    from doctor.fixing.plan import Look, Plan, Progress, Proof


def check(
    path: str | os.PathLike | Checkpoint,
    recipe: Recipe | None = None,
    *,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    stage: str = "output",
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    progress: Callable[[int], None] = lambda n: None,
    facts: Iterable[tuple[str, str, object]] = (),
    pictures: bool = False,
    extend_select: Iterable[str] = (),
    config: Config | None = None,
    baseline: Report | None = None,
    matrix: bool = False,
    room: str | os.PathLike | None = None,
    keep_partial: bool = False,
) -> Report:
    """Judge a checkpoint against a recipe, reading every byte of its tensors at most once.

    path: a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only JSON files and headers are
    read. stage: the most expensive kind of evidence to gather ("header" reads no weights). facts: (subject, fact,
    value) of a calibration or run made elsewhere. pictures: also make the tables that HTML and Markdown draw
    (Report.extra); matrix: only that of plans by GPU count. room: the directory that a quantized copy would be written
    to; memory and disk of this machine are then judged too. recipe: without one, that of config; a quantized checkpoint
    is judged against the plan that it states for itself, unless config has one. config: what doctor.lint.config.load()
    found; its selection comes before select and ignore, its recipe is the default, and its suppressions hold. None
    reads no configuration, not even the checkpoint's own. baseline: findings are new or not against it. keep_partial:
    Ctrl-C while weights are read ends the reading; the report holds what was found so far and, in its summary, what was
    not read. Else KeyboardInterrupt is raised. Raises BadCheckpoint where there is nothing to look at.
    """
    started = time.perf_counter()
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    recipe = recipe or _default_recipe(checkpoint, config)
    rules = _chosen(rules_dirs, config, select, extend_select, ignore)
    store = header_facts(checkpoint, recipe)
    if room is not None:
        _measure(checkpoint, store, recipe, room)
    for subject, name, value in facts:
        store.put(subject, name, value)
    scanned = None
    if checkpoint.unread:
        store.say_missing("values", checkpoint.unread)
    elif STAGES.index(stage) >= STAGES.index("values") and any(asks("values", r.facts) for r in rules):
        from doctor.scan.scan import scan

        scanned = scan(checkpoint, store, progress, keep_partial=keep_partial)
    findings, runs = judge(store, rules, stage)
    extra = {}
    stopped = scanned is not None and scanned.stopped.is_set()
    if (pictures or matrix) and not stopped:
        from doctor.report import figures as draw

        extra = (
            draw.pictures(checkpoint, store, rules, findings)
            if pictures
            else {"matrix": draw.matrix(store, rules, findings)}
        )
    report = Report(
        extra=extra,
        checkpoint=checkpoint.name,
        recipe=recipe,
        findings=locate(findings, checkpoint),
        runs=runs,
        summary=summary(checkpoint, store),
        skipped_tensors=scanned.skipped if scanned else {},
        bytes_read=scanned.bytes_read if scanned else 0,
        fail_on=fail_on,
    )
    if checkpoint.unread:
        report.summary["unread"] = checkpoint.unread
    if stopped:
        report.summary["interrupted"] = {
            "bytes_read": scanned.bytes_read,
            "bytes": checkpoint.total_bytes,
            "tensors_left": len(scanned.left),
        }
    if config is not None:
        _hush(report, config, checkpoint)
    if baseline is not None:
        against(report, baseline)
    report.seconds = time.perf_counter() - started
    return report


def _measure(checkpoint: Checkpoint, store: Store, recipe: Recipe, room: str | os.PathLike) -> None:
    """Put what this machine has, and what quantizing into `room` takes, where the config says what to quantize."""
    if store.has(CHECKPOINT, "spec"):
        from doctor.quant.capacity import measure

        store.put(CHECKPOINT, "given_machine", measure(checkpoint, store.get(CHECKPOINT, "spec"), recipe, room))


def _chosen(
    rules_dirs: Iterable[Path],
    config: Config | None,
    select: Iterable[str],
    extend_select: Iterable[str],
    ignore: Iterable[str],
) -> list:
    """The rules of a run: the configuration's layer, then the caller's."""
    config = config or Config()
    layers = (config.selection, Selection(tuple(select), tuple(extend_select), tuple(ignore)))
    return choose(load_rules(dict.fromkeys((*config.rules_dirs, *rules_dirs))), layers)


def _default_recipe(checkpoint: Checkpoint, config: Config | None) -> Recipe:
    """What a checkpoint is judged against where nobody gives a plan: a quantized one against the plan that it states
    for itself.
    """
    from doctor.plan.groups import STATED, stored_recipe

    own = config.recipe() if config else Recipe()
    return own if config and config.recipe_values.keys() & STATED else stored_recipe(checkpoint, own)


def _hush(report: Report, config: Config, checkpoint: Checkpoint) -> None:
    hushed = config.hush(report.findings, report.runs, checkpoint)
    report.findings, report.suppressed = in_order([*hushed.findings, *hushed.own]), hushed.suppressed
    report.runs = [*report.runs, *hushed.runs]


@dataclass
class FixResult:
    """What fix did, or would do. report_after is that of the output; in a dry run, of the source read through the
    edits.
    """

    plan: Plan
    report_before: Report
    report_after: Report
    output: Path
    receipt_path: Path | None = None  # None: nothing was written
    proofs: list[Proof] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def report(self) -> Report:
        return self.report_after


def fix(
    path: str | os.PathLike | Checkpoint,
    output: str | os.PathLike | None,
    recipe: Recipe | None = None,
    *,
    unsafe_fixes: bool | Iterable[str] = False,
    only: Iterable[str] = (),
    dry_run: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    stage: str = "output",
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    facts: Iterable[tuple[str, str, object]] = (),
    progress: Progress | None = None,
    extend_select: Iterable[str] = (),
    config: Config | None = None,
    base: str | os.PathLike | Checkpoint | None = None,
    in_place: bool = False,
) -> FixResult:
    """Write a cured copy of a checkpoint to `output`; the source is never written to, and the output is whole or
    absent.

    unsafe_fixes: True for every unsafe fix that need not be named, or codes ("all" among them means True), which also
    allow fixes that go by name only. only: fix nothing but these codes. Where no fix applies, nothing is written and
    receipt_path is None. progress(phase, bytes) is called from any thread with "fetch", "scan", "write" or "verify".
    base: another checkpoint, or org/name[@revision] on the Hub, whose files and tensors may stand for lost ones, and
    into which an adapter is merged. Of a repository only what is taken is fetched. in_place: output is None; the
    directory changes names with its fixed copy and is kept as NAME.before-fix, which `undo` puts back. Raises
    PlanRefused, MachineError, BadCheckpoint; then there is no output.
    """
    from doctor.fixing.plan import Consent, no_progress
    from doctor.fixing.staging import check_in_place, check_output

    started = time.perf_counter()
    rules = _chosen(rules_dirs, config, select, extend_select, ignore)
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    if in_place:
        output = os.path.abspath(source.root)
    codes = set() if isinstance(unsafe_fixes, bool) else set(unsafe_fixes)
    consent = Consent(unsafe_fixes is True or "all" in codes, frozenset(codes - {"all"}), frozenset(only))
    for code in consent.codes | consent.only:
        select_rules(rules, [code])
    if in_place:
        check_in_place(source, Path(output))
    elif not dry_run:
        check_output(source, Path(os.path.abspath(output)), overwrite)
    with _base(base, source, Path(os.path.abspath(output)), progress or no_progress) as given:
        return _fixed(
            source,
            Path(output),
            recipe or _default_recipe(source, config),
            rules,
            consent,
            given + list(facts),
            config,
            started,
            dry_run=dry_run,
            copy=copy,
            overwrite=overwrite,
            in_place=in_place,
            stage=stage,
            fail_on=fail_on,
            progress=progress or no_progress,
        )


def _fixed(
    source: Checkpoint,
    output: Path,
    recipe: Recipe,
    rules: list,
    consent,
    facts: list,
    config: Config | None,
    started: float,
    *,
    dry_run: bool,
    copy: bool,
    overwrite: bool,
    in_place: bool,
    stage: str,
    fail_on: str,
    progress: Progress,
) -> FixResult:
    """Plan, prove, carry out."""
    from doctor.core.errors import PlanRefused
    from doctor.edits.kinds import Rebase
    from doctor.fixing.plan import carry_out, make_plan, refuse

    plan = make_plan(
        source,
        recipe,
        rules,
        consent,
        facts=facts,
        stage=stage,
        progress=progress,
        hush=config.hush if config else None,
    )
    result = FixResult(
        plan,
        _report(plan.before, plan.recipe, fail_on, started),
        _report(plan.after, plan.recipe, fail_on, started),
        output,
    )
    if in_place and any(isinstance(e, Rebase) for e in plan.view.edits):
        raise PlanRefused(
            f"{source.root}: what an adapter is merged into is another model, which does not take its place.",
            "Write it with -o.",
        )
    if dry_run or not plan.steps:
        return result
    refuse(plan)
    if plan.needs_proof:
        from doctor.evaluate.proof import prove

        result.proofs.append(prove(plan.unpadded(), plan.view))
    done = carry_out(
        plan,
        output,
        rules,
        copy=copy,
        overwrite=overwrite,
        in_place=in_place,
        proofs=result.proofs,
        facts=facts,
        stage=stage,
        progress=progress,
    )
    result.report_after = _report(done.look, plan.recipe, fail_on, started)
    result.report_after.checkpoint = done.output.name  # it was judged on the stage, which has its name now
    result.report_after.summary["path"] = str(done.output)
    result.report_after.findings += _unproved(plan, result.proofs)
    result.receipt_path, result.notes = done.receipt, done.notes
    return result


def undo(path: str | os.PathLike) -> list[str]:
    """Give a directory back what `fix --in-place` replaced; returns what was done, one sentence a line.

    Only a fix in place replaces anything: an output of `fix -o` is deleted by whoever made it. Raises PlanRefused,
    MachineError, BadCheckpoint.
    """
    from doctor.fixing import in_place
    from doctor.fixing.plan import SCHEMA
    from doctor.fixing.staging import RECEIPT, changed_since

    path = Path(os.path.abspath(path))
    notes = in_place.recover(path)
    if notes and not in_place.kept_name(path).exists():
        return notes
    receipt = Checkpoint.open(path).value(RECEIPT)
    if receipt is None or receipt.get("schema") != SCHEMA:
        raise BadCheckpoint(f"{path}: holds no receipt of doctor ({RECEIPT}); nothing here says what to undo.")
    return [*notes, in_place.undo(path, receipt, changed_since(path, receipt))]


def recover(path: str | os.PathLike) -> list[str]:
    """Finish or take back a fix in place that was killed; says what was done, [] where nothing was to do."""
    from doctor.fixing import in_place

    return in_place.recover(Path(os.path.abspath(path)))


@contextmanager
def _base(
    base: str | os.PathLike | Checkpoint | None, source: Checkpoint, output: Path, progress: Progress
) -> Iterator[list]:
    """The fact `base`, while it may be read from: what is fetched from the Hub lies beside the output and is removed at
    the end.
    """
    from doctor.edits.donor import Donor
    from doctor.edits.donor_registry import donate
    from doctor.fixing.staging import open_fetch

    if base is None:
        yield []
        return
    text = str(base.root if isinstance(base, Checkpoint) else base)
    found = base if isinstance(base, Checkpoint) else open_checkpoint(text)
    if isinstance(found, HubCheckpoint) and "adapter_config.json" in source.entries and not source.value("config.json"):
        found = open_checkpoint(text, download=True)  # what an adapter is merged into is needed whole
    if isinstance(found, HubCheckpoint):
        found = found.donor()
    if found.unread or not found.tensors:
        raise BadCheckpoint(
            f"{text}: {found.unread or 'no safetensors tensor can be read'}; --from needs weights to take from."
        )
    if os.path.realpath(found.root) == os.path.realpath(source.root):
        raise BadCheckpoint(f"{text}: is the checkpoint itself.", "Give the base model, or another copy.")
    given = [(CHECKPOINT, "base", Donor(found, source, text))]
    if not isinstance(found, HubDonor):
        yield given
        return
    with open_fetch(output) as found.folder, donate(found.label, found):
        found.progress = partial(progress, "fetch")
        yield given


def _report(seen: Look, recipe: Recipe, fail_on: str, started: float) -> Report:
    return Report(
        checkpoint=seen.checkpoint.name,
        recipe=recipe,
        findings=list(seen.findings),
        runs=seen.runs,
        summary=summary(seen.checkpoint, seen.store),
        skipped_tensors=seen.skipped,
        bytes_read=seen.bytes_known,
        seconds=time.perf_counter() - started,
        fail_on=fail_on,
        suppressed=seen.suppressed,
    )


def _unproved(plan: Plan, proofs: list[Proof]) -> list[Finding]:
    """A proof that could not be run is a finding of the fix that asked for it."""
    reasons = [p.detail for p in proofs if p.status == "not run"]
    return [
        Finding(
            f"{step.title}: done without its proof: {reason}",
            Place("config.json"),
            code=step.code,
            name=step.name,
            severity="warning",
            certainty="certain",
            subject=CHECKPOINT,
        )
        for step in plan.steps
        if step.pads
        for reason in reasons
    ]


def verify(original: str | os.PathLike, quantized: str | os.PathLike, **options) -> Report:
    """Report on a quantized checkpoint against its original; see doctor.evaluate.verify.verify for the options."""
    from doctor.evaluate.verify import verify as run

    return run(original, quantized, **options)


def quantize(path: str | os.PathLike | Checkpoint, output: str | os.PathLike, recipe: Recipe | None = None, **options):
    """Quantize a 16-bit checkpoint into `output`; see doctor.quant.quantize.quantize for the options and the
    QuantizeResult.
    """
    from doctor.evaluate.proof import prove
    from doctor.quant.quantize import quantize as run

    return run(path, output, recipe, prove=prove, **options)


def plan_quantize(
    path: str | os.PathLike | Checkpoint, output: str | os.PathLike, recipe: Recipe | None = None, **options
):
    """Forecast of memory and disk of quantizing, from headers alone; see doctor.quant.quantize.plan for the options."""
    from doctor.quant.quantize import plan

    return plan(path, output, recipe, **options)


def kvcache(path: str | os.PathLike | Checkpoint, **options):
    """KvReport on a model's key/value cache; see doctor.evaluate.kvcache.study.kvcache for the options."""
    from doctor.evaluate.kvcache.study import kvcache as run

    return run(path, **options)
