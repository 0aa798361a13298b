"""The Python doors: check, fix, quantize, verify. The command line calls these and adds only parsing and printing."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from doctor.builtin import header_facts
from doctor.checkpoint import Checkpoint
from doctor.engine import Report, judge, load_rules, locate, select_rules
from doctor.facts import CHECKPOINT, STAGES, Store
from doctor.recipe import Recipe
from doctor.scan import scan


def check(path: str | os.PathLike | Checkpoint, recipe: Recipe | None = None, *, select: Iterable[str] = (), ignore: Iterable[str] = (),
          stage: str = "output", fail_on: str = "error", rules_dirs: Iterable[Path] = (),
          progress: Callable[[int], None] = lambda n: None, facts: Iterable[tuple[str, str, object]] = ()) -> Report:
    """Judge a checkpoint against a recipe, reading every byte of its tensors at most once.

    stage: the most expensive kind of evidence to gather ("header" reads no weights). facts: (subject, fact, value) of a
    calibration or run made elsewhere. Raises BadCheckpoint where there is nothing to look at.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    rules = select_rules(load_rules(rules_dirs), select, ignore)
    store = header_facts(checkpoint, recipe)
    for subject, name, value in facts:
        store.put(subject, name, value)
    scanned = None
    if STAGES.index(stage) >= STAGES.index("values") and any(r.stage in STAGES[2:] for r in rules):
        scanned = scan(checkpoint, store, progress)
    findings, runs = judge(store, rules, stage)
    return Report(checkpoint=checkpoint.name, recipe=recipe, findings=locate(findings, checkpoint), runs=runs,
                  summary=summary(checkpoint, store), skipped_tensors=scanned.skipped if scanned else {},
                  bytes_read=scanned.bytes_read if scanned else 0, seconds=time.perf_counter() - started, fail_on=fail_on)


def summary(checkpoint: Checkpoint, store: Store) -> dict:
    """What the second line of every report says about the files."""
    kinds: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        kinds[info.dtype.name] = kinds.get(info.dtype.name, 0) + info.nbytes
    spec = store.get(CHECKPOINT, "spec") if store.has(CHECKPOINT, "spec") else None
    return {
        "path": str(checkpoint.root), "architecture": spec.architecture or spec.model_type if spec else "",
        "parameters": sum(t.numel for t in checkpoint.tensors.values()), "dtype": max(kinds, key=kinds.get, default=""),
        "shards": len(checkpoint.shards), "tensors": len(checkpoint.tensors), "bytes": checkpoint.total_bytes,
        "blocks": spec.n_layers if spec else None, "linears": len(spec.linears) if spec else 0,
    }
