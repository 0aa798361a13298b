"""`fix` and what takes it back: `undo`, and `recover` after a fix in place that was killed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from doctor.api.checking import Facts
from doctor.api.clients import load_proof, prove_logits
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.config import Config, default_recipe, rules_of
from doctor.lint.engine import select_rules

if TYPE_CHECKING:
    from doctor.fixing.assess import Progress
    from doctor.fixing.result import FixResult


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
    allow fixes that must be named. only: fix nothing but these codes. donor: another checkpoint, or
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
            prove=prove_logits,
            load=load_proof(),
        )
        result.notes = [*stale, *result.notes]
        return result


def undo(path: str | os.PathLike[str]) -> list[str]:
    """Put back what `fix --in-place` replaced; returns what was done, a sentence an item.

    The output of `fix -o` is deleted to undo it. Raises PlanRefused, MachineError, BadCheckpoint.
    """
    from doctor.fixing.undo import undo_fix as run

    return [*run(path)]


def recover(path: str | os.PathLike[str]) -> list[str]:
    """Finish or take back a fix in place that was killed; returns what was done, [] where there was nothing to do."""
    from doctor.fixing.in_place import recover as run

    return [*run(Path(os.path.abspath(path)))]
