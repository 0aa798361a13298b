"""All that a user imports: check, fix, quantize, convert, tune, verify, kvcache, advise, explain, undo, recover.

Modules that only some of them need are imported where they are needed, because a check of headers alone must be fast.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.facts import COSTS, asks
from doctor.core.recipe import Recipe
from doctor.core.records import MERGE_PROOF
from doctor.core.rehearsal import GIVEN_REHEARSAL
from doctor.core.store import Store
from doctor.lint.as_floats import read_as_floats, refused_by_headers
from doctor.lint.baseline import compare_with
from doctor.lint.config import Config, default_recipe, rules_of
from doctor.lint.engine import Report, judge, load_rules, locate, select_rules
from doctor.lint.rule import Rule
from doctor.scan.header import DECODED, SPEC, header_facts
from doctor.scan.summary import summary

if TYPE_CHECKING:
    from concurrent.futures import Future

    from doctor.core.options import AdviseOptions, KvcacheOptions, QuantizeOptions, VerifyOptions
    from doctor.core.records import LoadProof
    from doctor.core.rehearsal import Rehearsal
    from doctor.evaluate.advise.advise import Advice
    from doctor.evaluate.kvcache.study import KvReport
    from doctor.fixing.assess import Progress
    from doctor.fixing.proof import Proof
    from doctor.fixing.result import FixResult
    from doctor.quant.client import Client
    from doctor.quant.convert import Converted
    from doctor.quant.preflight import Forecast
    from doctor.quant.quantize_result import QuantizeResult
    from doctor.quant.tuning.tune import Tuned

Facts = Iterable[tuple[str, str, object]]  # (subject, fact, value)


def check(
    path: str | os.PathLike[str] | Checkpoint,
    recipe: Recipe | None = None,
    *,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    stage: str = "output",
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    progress: Callable[[int], None] = lambda n: None,
    facts: Facts = (),
    figures: bool = False,
    extend_select: Iterable[str] = (),
    config: Config | None = None,
    baseline: Report | None = None,
    matrix: bool = False,
    capacity: str | os.PathLike[str] | None = None,
    keep_partial: bool = False,
    merged_from: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
) -> Report:
    """Check a checkpoint against a recipe, reading every byte of its tensors at most once.

    path: a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only JSON files and headers are
    read. recipe: the default is config's; a quantized checkpoint is checked against its own quantization_config, unless
    config has a recipe. stage: the most expensive kind of evidence to gather ("header" reads no weights). facts:
    (subject, fact, value) of a calibration or run made elsewhere. figures: also make the tables that HTML and Markdown
    draw (Report.extra). matrix: only the one of recipes by GPU count. capacity: the directory that a quantized copy
    would be written to; memory and disk of this machine are then checked too. config: from doctor.lint.config.load();
    its selection comes before select and ignore, its recipe is the default, and its suppressions apply. None reads no
    configuration, not even the checkpoint's own. baseline: an earlier report; each finding is marked new or unchanged
    against it. keep_partial: Ctrl-C while weights are read ends the scan, and the report holds what was found so far
    and, in its summary, what was not read. Else KeyboardInterrupt is raised. merged_from: (base, LoRA adapter) that the
    checkpoint was merged of; each matrix is compared with their sum, and every other tensor with the base. Raises
    BadCheckpoint where nothing can be read.
    """
    started = time.perf_counter()
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    recipe = recipe or default_recipe(checkpoint, config)
    rules = rules_of(rules_dirs, config, select, extend_select, ignore)
    source, (checkpoint, decoding) = checkpoint, read_as_floats(checkpoint, recipe, rules)
    store = header_facts(checkpoint, recipe)
    store.put(DECODED, decoding)
    if capacity is not None:
        from doctor.quant.capacity import put_machine

        put_machine(checkpoint, store, recipe, capacity)
    for subject, name, value in facts:
        store.put_value(name, value, subject)
    reads_values = COSTS.index(stage) >= COSTS.index("values")
    if merged_from is not None and reads_values:
        from doctor.scan.merge import prove_merge

        base, adapter = map(Checkpoint.open, merged_from)
        store.put(MERGE_PROOF, prove_merge(checkpoint, base, adapter))
    scanned, rehearsing = None, _rehearsal(source, store, recipe, rules) if reads_values else None
    if checkpoint.unread:
        store.say_missing("values", checkpoint.unread)
    elif reads_values and any(asks("values", r.facts) for r in rules):
        from doctor.scan.scan import scan

        scanned = scan(checkpoint, store, progress, keep_partial=keep_partial)
    stopped = scanned is not None and scanned.stopped.is_set()
    if rehearsing and not stopped:
        store.put(GIVEN_REHEARSAL, rehearsing.result())
    findings, runs = judge(store, rules, stage)
    extra: dict[str, Any] = {}
    if (figures or matrix) and not stopped:
        from doctor.report import figures as draw

        extra = (
            draw.pictures(checkpoint, store, rules, findings)
            if figures
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
    report.summary |= {"unread": checkpoint.unread} if checkpoint.unread else {}
    if tuple(select) or (config and config.selection.select):
        report.summary["selected"] = len(rules)
    if scanned is not None and stopped:
        report.summary["interrupted"] = {
            "bytes_read": scanned.bytes_read,
            "bytes": checkpoint.total_bytes,
            "tensors_left": len(scanned.left),
        }
    if config is not None:
        config.suppress_in(report, checkpoint)
    if baseline is not None:
        compare_with(report, baseline)
    report.seconds = time.perf_counter() - started
    return report


def _rehearsal(checkpoint: Checkpoint, store: Store, recipe: Recipe, rules: list[Rule]) -> Future[Rehearsal] | None:
    """A rehearsal of quantizing under way in a process of its own, while weights are read; None where none is made."""
    unable = os.environ.get("DOCTOR_LOAD_PROOF") == "0" or checkpoint.unread or not store.has(SPEC)
    if unable or not any("rehearsal" in r.facts for r in rules) or refused_by_headers(store, rules):
        return None
    from doctor.evaluate.clients.rehearsal import start

    return start(checkpoint, recipe)


def fix(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None,
    recipe: Recipe | None = None,
    *,
    unsafe_fixes: bool | Iterable[str] = False,
    only: Iterable[str] = (),
    dry_run: bool = False,
    copy: bool = False,
    link: bool = False,
    overwrite: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    stage: str = "output",
    fail_on: str = "error",
    rules_dirs: Iterable[Path] = (),
    facts: Facts = (),
    progress: Progress | None = None,
    extend_select: Iterable[str] = (),
    config: Config | None = None,
    donor: str | os.PathLike[str] | Checkpoint | None = None,
    in_place: bool = False,
) -> FixResult:
    """Write a fixed copy of a checkpoint to `output`. The source is never written to; the output is complete or absent.

    unsafe_fixes: True for every unsafe fix that need not be named, or codes ("all" among them means True), which also
    allow fixes that must be named. only: fix nothing but these codes. base: the donor, another checkpoint or
    org/name[@revision] on the Hub: lost files and tensors are copied from it, and an adapter is merged into it. Of a
    repository only what is copied is downloaded. copy, link: unchanged files are copies, or hard links to those of the
    source; else the file system decides (doctor.fixing.filesystem.Carry). in_place: output is None; the directory
    exchanges names with its fixed copy and is kept as NAME.before-fix, which `undo` puts back. progress(phase, bytes):
    called from any thread with "fetch", "scan", "write" or "verify".

    Where tensors or config.json changed, transformers loads the output on the meta device before it appears. What it
    does not load whole is refused where it loads the source whole, else an error finding (O617). Where nothing needs a
    fix, output is a linked copy. In place, or where errors stay that no fix applies to, nothing is written and
    receipt_path is None. Raises PlanRefused, MachineError, BadCheckpoint; then there is no output.
    """
    from doctor.fixing.assess import no_progress
    from doctor.fixing.consent import Consent
    from doctor.fixing.donor_source import donor_facts
    from doctor.fixing.filesystem import Carry
    from doctor.fixing.outputs import check_in_place, check_output
    from doctor.fixing.run import run
    from doctor.fixing.staging import hold_output

    started = time.perf_counter()
    rules = rules_of(rules_dirs, config, select, extend_select, ignore)
    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    if output is None and not in_place:
        raise TypeError("fix: output is None; must be a path, or in_place=True")
    target = Path(os.path.abspath(source.root if in_place or output is None else output))
    codes = set() if isinstance(unsafe_fixes, bool) else set(unsafe_fixes)
    consent = Consent(unsafe_fixes is True or "all" in codes, frozenset(codes - {"all"}), frozenset(only))
    for code in consent.codes | consent.only:
        select_rules(rules, [code])
    if in_place:
        check_in_place(source, target)
    elif not dry_run:
        check_output(source, target, overwrite)
    carry = Carry.COPY if copy else Carry.LINK if link else Carry.AUTO
    with contextlib.ExitStack() as stack:
        stale = [] if dry_run else stack.enter_context(hold_output(target))
        given = stack.enter_context(donor_facts(donor, source, target, progress or no_progress))
        result = run(
            source,
            target if in_place or output is None else Path(output),
            recipe or default_recipe(source, config),
            rules,
            consent,
            [*given, *facts],
            config.apply_suppressions if config else None,
            started,
            dry_run=dry_run,
            carry=carry,
            overwrite=overwrite,
            in_place=in_place,
            stage=stage,
            fail_on=fail_on,
            progress=progress or no_progress,
            prove=_prove_logits,
            load=_load_proof(),
        )
        result.notes = [*stale, *result.notes]
        return result


def _prove_logits(before: Checkpoint, after: Checkpoint) -> Proof:
    """The proof of shape fixes; its module imports torch."""
    from doctor.evaluate.proof import prove

    return prove(before, after)


def _load_proof() -> Callable[[Path], LoadProof] | None:
    """What asks transformers to load a directory; None where that is turned off."""
    if os.environ.get("DOCTOR_LOAD_PROOF") == "0":
        return None
    from doctor.evaluate.clients.load_proof import prove_loading

    return prove_loading


def _client(recipe: Recipe | None = None) -> Client | None:
    """Who is asked about an output; None where that is turned off."""
    from doctor.evaluate.clients.rehearsal import client_of

    return None if os.environ.get("DOCTOR_LOAD_PROOF") == "0" else client_of(recipe or Recipe())


def undo(path: str | os.PathLike[str]) -> list[str]:
    """Put back what `fix --in-place` replaced; returns what was done, a sentence an item.

    The output of `fix -o` is deleted to undo it. Raises PlanRefused, MachineError, BadCheckpoint.
    """
    from doctor.fixing.undo import undo_fix as run

    return [*run(path)]


def advise(path: str | os.PathLike[str] | Checkpoint, **options: Unpack[AdviseOptions]) -> Advice:
    """What a checkpoint can be served with in so much memory; see doctor.evaluate.advise.advise.advise."""
    from doctor.evaluate.advise.advise import advise as run

    return run(path, **options)


def explain(what: str) -> str:
    """Markdown of the page of a rule, by code or name; for the text of an error, of the rules that it points to."""
    from doctor.locale.rule_pages import pages_for

    return pages_for(what, load_rules())


def recover(path: str | os.PathLike[str]) -> list[str]:
    """Finish or take back a fix in place that was killed; returns what was done, [] where there was nothing to do."""
    from doctor.fixing.in_place import recover as run

    return [*run(Path(os.path.abspath(path)))]


def verify(
    original: str | os.PathLike[str], quantized: str | os.PathLike[str], **options: Unpack[VerifyOptions]
) -> Report:
    """Compare a quantized checkpoint with its original; for the options see doctor.evaluate.verify.verify."""
    from doctor.quant.early import require_comparable

    first, second = Checkpoint.open(original), Checkpoint.open(quantized)
    require_comparable(first, second, options.get("text"))  # before torch is imported
    from doctor.evaluate.verify import verify as run

    options.setdefault("load_proof", os.environ.get("DOCTOR_LOAD_PROOF") != "0")
    return run(first, second, **options)


def quantize(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    compare_rows: int = 0,
    **options: Unpack[QuantizeOptions],
) -> QuantizeResult:
    """Quantize a 16-bit checkpoint into `output`; see doctor.quant.quantize.quantize for the options.

    What headers refuse is raised, or returned as a report of them, before torch is imported. compare_rows: rows of 512
    tokens, that calibrated nothing, to compare the output on; 0 for none.
    """
    from doctor.quant.early import refused_by_headers
    from doctor.quant.quantize_result import QuantizeResult
    from doctor.quant.stage import refuse_output

    source = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    refuse_output(source, output, **options)
    refused = refused_by_headers(source, output, recipe or Recipe(), **options)
    if refused is not None:
        return QuantizeResult(refused)
    from doctor.evaluate.divergence import divergence
    from doctor.quant.quantize import quantize as run

    device = options.get("device", "cpu")
    options = {"prove": _prove_logits, "client": _client(recipe), **options}
    options.setdefault("diverge", partial(divergence, device=device))
    if compare_rows and os.environ.get("WORLD_SIZE", "1") == "1":
        options.setdefault("compare", partial(verify, rows=compare_rows, memory=0, load_proof=False, device=device))
    return run(source, output, recipe, **options)


def convert(
    path: str | os.PathLike[str] | Checkpoint, output: str | os.PathLike[str], target: str, **options: Any
) -> Converted:
    """Write a quantized checkpoint in another stored format, or as 16-bit floats; see doctor.quant.convert.convert."""
    from doctor.quant.convert import convert as run

    return run(path, output, target, **{"client": _client(), **options})


def tune(
    quantized: str | os.PathLike[str] | Checkpoint,
    original: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    **options: Any,
) -> Tuned:
    """Tune the scales and norms of a quantized checkpoint against its original; see doctor.quant.tuning.tune.tune."""
    from doctor.quant.calibration.documents import require_text_of
    from doctor.quant.early import require_tunable

    source, teacher = (x if isinstance(x, Checkpoint) else Checkpoint.open(x) for x in (quantized, original))
    rules = load_rules(dict.fromkeys(options.get("rules_dirs", ())))
    require_tunable(source, teacher, Path(os.path.abspath(output)), rules, options.get("overwrite", False))
    require_text_of(options.get("calibration"))
    from doctor.quant.tuning.tune import tune as run

    return run(source, teacher, output, **{"client": _client(), **options})


def plan_quantize(
    path: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str],
    recipe: Recipe | None = None,
    **options: Any,
) -> Forecast:
    """Forecast memory and disk of quantizing, from headers alone; see doctor.quant.quantize.plan for the options."""
    from doctor.quant.quantize import plan

    return plan(path, output, recipe, **options)


def kvcache(path: str | os.PathLike[str] | Checkpoint, **options: Unpack[KvcacheOptions]) -> KvReport:
    """Size and error of a model's key/value cache; for the options see doctor.evaluate.kvcache.study.kvcache."""
    from doctor.quant.early import require_cached

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    require_cached(checkpoint, **options)  # before torch is imported
    from doctor.evaluate.kvcache.study import kvcache as run

    return run(checkpoint, **options)
