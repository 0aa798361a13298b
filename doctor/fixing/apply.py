"""Carries out a fix plan: writes the overlay, checks it again from disk, and renames it into place.

The staging directory is opened from disk, every changed shard is read again under all rules, and the output appears
only if it shows what the plan showed.
"""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.json_text import dumps
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.facts import COSTS
from doctor.core.finding import Finding
from doctor.core.messages import Message, _
from doctor.edits.donor import Donor
from doctor.edits.donor_registry import open_donor
from doctor.edits.kinds import Rebase, TakeFile
from doctor.fixing.assess import Assessment, Progress, assess, no_progress
from doctor.fixing.filesystem import Carry, sha256
from doctor.fixing.in_place import kept_name
from doctor.fixing.loading import Load, judged_proof, proved
from doctor.fixing.overlay_writer import write_overlay
from doctor.fixing.plan import Plan, finding_key, refuse
from doctor.fixing.proof import Proof
from doctor.fixing.receipt import RECEIPT, build_receipt
from doctor.fixing.staging import StagingDir, open_staging
from doctor.lint.engine import locate
from doctor.lint.rule import Rule
from doctor.scan.header import BASE, SPEC
from doctor.scan.value_facts import STATS

Digests = dict[str, tuple[str | None, str]]  # changed file -> sha256 before (None: no readable file) and after


@dataclass
class Applied:
    """What a plan that was carried out left on disk."""

    output: Path
    receipt: Path
    assessment: Assessment
    notes: list[Message]
    loading: list[Finding] = field(default_factory=list)  # what the rules say of the client's loading of it


def apply_plan(
    plan: Plan,
    output: Path,
    rules: list[Rule],
    *,
    carry: Carry = Carry.AUTO,
    overwrite: bool = False,
    in_place: bool = False,
    proofs: Iterable[Proof] = (),
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = COSTS[-1],
    progress: Progress = no_progress,
    load: Load | None = None,
) -> Applied:
    """Write the plan's overlay to `output`, assess it from disk, let a client load it, commit.

    load: the client's loader, asked where another model than before may be built; None asks nobody.

    Raises PlanRefused, MachineError, BadCheckpoint; then there is no output.
    """
    proofs = list(proofs)
    refuse(plan, proofs)
    with open_staging(
        plan.overlay,
        output,
        carry=carry,
        overwrite=overwrite,
        in_place=in_place,
        progress=lambda n: progress("write", n),
    ) as staging:
        write_overlay(plan.overlay, staging, carry=carry)
        again, digests = _verify(plan, staging, rules, list(facts), stage, progress)
        loading = _load(plan, load, again, output, rules, staging) if load is not None and plan.changes_model else []
        receipt = build_receipt(
            plan.source,
            plan.recipe,
            plan.steps,
            plan.overlay,
            donor=_donor(plan),
            digests=digests,
            files=staging.files,
            not_carried=staging.not_carried,
            findings_before=plan.before.findings,
            findings_after=again.findings,
            proofs=proofs,
            kept=kept_name(staging.output).name if staging.in_place else None,
        )
        staging.add(RECEIPT, (dumps(receipt, indent=2) + "\n").encode())
        staging.commit()
    return Applied(staging.output, staging.output / RECEIPT, again, staging.notes, loading)


def _load(
    plan: Plan, load: Load, written: Assessment, output: Path, rules: list[Rule], staging: StagingDir
) -> list[Finding]:
    """Findings of the client's loading of the staged files; what it said goes into the notes."""
    model_type = written.store.get(SPEC).model_type if written.store.has(SPEC) else ""
    proof = proved(load, staging.path, _origin(plan).root, output, plan.recipe, model_type)
    found, note = judged_proof(proof, written.store, rules)
    staging.notes.append(note)
    return locate(found, written.checkpoint)


def _donor(plan: Plan) -> Donor | None:
    store = plan.before.store
    return cast("Donor | None", store.get(BASE)) if store.has(BASE) else None


def _verify(
    plan: Plan,
    staging: StagingDir,
    rules: list[Rule],
    facts: list[tuple[str, str, object]],
    stage: str,
    progress: Progress,
) -> tuple[Assessment, Digests]:
    """Open the staging directory from disk, read every changed shard, and demand what the plan showed."""
    only = plan.overlay.only
    disk = Checkpoint.open(staging.path / only if only else staging.path)
    changed = [n for n in plan.files_written if n in disk.entries]
    touched = {t.name for n in changed if n in disk.shards for t in disk.shards[n].tensors}
    with ThreadPoolExecutor(2) as pool:  # hashing releases Python's lock, so it runs beside the scan
        after = {n: pool.submit(sha256, staging.path / n) for n in changed}
        origin = _origin(plan)
        before = {
            n: pool.submit(_sha256_if_readable, origin.path(old))
            for n in changed
            if (old := plan.overlay.origin(n)) in origin.entries
        }
        again = assess(
            disk,
            plan.recipe,
            rules,
            facts=facts,
            stage=stage,
            before=plan.after,
            touched=touched,
            progress=lambda n: progress("verify", n),
            suppress=plan.suppress,
        )
        digests = {n: (before[n].result() if n in before else None, after[n].result()) for n in changed}
    _check_donated_files(plan, digests)
    _check_findings(plan, staging, disk, again)
    _check_values(plan, again, touched)
    return again, digests


def _check_donated_files(plan: Plan, digests: Digests) -> None:
    for edit in plan.overlay.edits:
        if not isinstance(edit, TakeFile):
            continue
        name = plan.overlay.new_name(edit.file)
        if name in plan.overlay.substituted and digests[name][1] != edit.sha256:
            raise BadCheckpoint(
                _(
                    "{file}: was copied with sha256 {found}; the plan was made for {expected}.",
                    file=edit.file,
                    found=digests[name][1],
                    expected=edit.sha256,
                ),
                _("Nothing was kept; run the command again."),
            )


def _check_findings(plan: Plan, staging: StagingDir, disk: Checkpoint, again: Assessment) -> None:
    expected = Counter(finding_key(f, disk) for f in plan.after.findings)
    unexpected = [f for f in again.findings if not expected[finding_key(f, disk)]]
    if unexpected:
        raise PlanRefused(
            _(
                "{output}: the written files show {code}, which the plan did not: {message}.",
                output=staging.output,
                code=unexpected[0].code,
                message=unexpected[0].message,
            ),
            _("Nothing was kept. Another program changed the files, or it is an internal error (a bug in doctor)."),
        )


def _check_values(plan: Plan, again: Assessment, touched: set[str]) -> None:
    for name in sorted(touched):
        subject = f"tensor:{name}"
        if again.store.has(STATS, subject) and again.store.get(STATS, subject) != plan.after.store.get(STATS, subject):
            raise BadCheckpoint(
                _("{tensor}: the written values are not the planned ones.", tensor=name),
                _("Nothing was kept; run the command again."),
            )


def _sha256_if_readable(path: Path) -> str | None:
    """None for a file that cannot be read, which is then what was fixed."""
    try:
        return sha256(path)
    except OSError:
        return None


def _origin(plan: Plan) -> Checkpoint:
    """The checkpoint whose files the overlay changes: the source, or the base that an adapter is merged into."""
    other = next((e for e in plan.overlay.edits if isinstance(e, Rebase)), None)
    return plan.source if other is None else open_donor(other.root)
