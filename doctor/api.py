"""The Python doors: check, fix, quantize, verify. The command line calls these and adds only parsing and printing."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from doctor.builtin import header_facts, summary
from doctor.checkpoint import Checkpoint
from doctor.engine import Report, judge, load_rules, locate, select_rules
from doctor.facts import CHECKPOINT, STAGES, Store
from doctor.recipe import Recipe
from doctor.scan import scan


def check(path: str | os.PathLike | Checkpoint, recipe: Recipe | None = None, *, select: Iterable[str] = (), ignore: Iterable[str] = (),
          stage: str = "output", fail_on: str = "error", rules_dirs: Iterable[Path] = (),
          progress: Callable[[int], None] = lambda n: None, facts: Iterable[tuple[str, str, object]] = (),
          pictures: bool = False) -> Report:
    """Judge a checkpoint against a recipe, reading every byte of its tensors at most once.

    stage: the most expensive kind of evidence to gather ("header" reads no weights). facts: (subject, fact, value) of a
    calibration or run made elsewhere. pictures: also make the tables that HTML and Markdown draw (Report.extra).
    Raises BadCheckpoint where there is nothing to look at.
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
    extra = {}
    if pictures:
        from doctor.pictures import pictures as draw

        extra = draw(checkpoint, store, rules, findings)
    return Report(extra=extra, checkpoint=checkpoint.name, recipe=recipe, findings=locate(findings, checkpoint), runs=runs,
                  summary=summary(checkpoint, store), skipped_tensors=scanned.skipped if scanned else {},
                  bytes_read=scanned.bytes_read if scanned else 0, seconds=time.perf_counter() - started, fail_on=fail_on)


def verify(original: str | os.PathLike, quantized: str | os.PathLike, **options) -> Report:
    """Report on a quantized checkpoint against its original; see doctor.evaluate.verify.verify for the options."""
    from doctor.evaluate.verify import verify as run

    return run(original, quantized, **options)
