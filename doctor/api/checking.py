"""`check`: the rules on one checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import open_checkpoint
from doctor.core.facts import COSTS, asks
from doctor.core.options import FilePath, InMemory
from doctor.core.recipe import Recipe
from doctor.core.records import MERGE_PROOF
from doctor.core.rehearsal import GIVEN_REHEARSAL
from doctor.core.store import Store
from doctor.lint.as_floats import read_as_floats, refused_by_headers
from doctor.lint.baseline import compare_with
from doctor.lint.config import Config, default_recipe, rules_of
from doctor.lint.engine import Report, judge, locate
from doctor.lint.rule import Rule
from doctor.scan.header import DECODED, SPEC, header_facts
from doctor.scan.summary import summary

if TYPE_CHECKING:
    from concurrent.futures import Future

    from doctor.core.rehearsal import Rehearsal

Facts = Iterable[tuple[str, str, object]]  # (subject, fact, value)


def check(
    path: FilePath | Checkpoint | InMemory,
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
    merged_from: tuple[FilePath, FilePath] | None = None,
    model_config: Any = None,
) -> Report:
    """Check a checkpoint against a recipe, reading every byte of its tensors at most once.

    path: a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only JSON files and headers are
    read; or a model in memory: a torch module, or a mapping of names to tensors, with model_config where it has one.
    Such a model is judged without files and without a plan, unless a recipe is given, and its findings have no fixes.
    recipe: the default is config's; a quantized checkpoint is checked against its own quantization_config, unless
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
    if not isinstance(path, (str, os.PathLike, Checkpoint)):
        given = {"stage": stage != "output", "facts": facts, "figures": figures, "config": config, "matrix": matrix}
        given |= {"capacity": capacity, "keep_partial": keep_partial, "merged_from": merged_from}
        if any(given.values()):
            raise TypeError(f"check: a model in memory takes no {', '.join(k for k, v in given.items() if v)}")
        from doctor.evaluate.in_memory import check_in_memory

        return check_in_memory(
            path,
            recipe,
            model_config=model_config,
            select=select,
            extend_select=extend_select,
            ignore=ignore,
            rules_dirs=rules_dirs,
            fail_on=fail_on,
            progress=progress,
            baseline=baseline,
        )
    if model_config is not None:
        raise TypeError("check: model_config goes with a model in memory; a directory has its config.json")
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
    scanned, rehearsing = None, _rehearsal(source, store, recipe, rules) if reads_values else None
    if checkpoint.unread:
        store.say_missing("values", checkpoint.unread)
    elif reads_values and any(asks("values", r.facts) for r in rules):
        from doctor.scan.merge import MergeWatch
        from doctor.scan.scan import scan

        merge = MergeWatch(checkpoint, *map(Checkpoint.open, merged_from)) if merged_from is not None else None
        watch = merge.of if merge else None
        scanned = scan(checkpoint, store, progress, keep_partial=keep_partial, watch=watch)
        if merge and not scanned.stopped.is_set():
            store.put(MERGE_PROOF, merge.result())
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
