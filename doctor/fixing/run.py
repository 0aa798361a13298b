"""A fix from end to end: plan, prove, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.edits.kinds import Rebase
from doctor.fixing.apply import apply_plan
from doctor.fixing.assess import Progress, Suppress
from doctor.fixing.consent import Consent
from doctor.fixing.filesystem import Carry
from doctor.fixing.loading import Load
from doctor.fixing.plan import make_plan, refuse
from doctor.fixing.proof import Proof
from doctor.fixing.result import FixResult, report_of, unproved
from doctor.lint.rule import Rule


def run(
    source: Checkpoint,
    output: Path,
    recipe: Recipe,
    rules: list[Rule],
    consent: Consent,
    facts: list[tuple[str, str, object]],
    suppress: Suppress | None,
    started: float,
    *,
    dry_run: bool,
    carry: Carry,
    overwrite: bool,
    in_place: bool,
    stage: str,
    fail_on: str,
    progress: Progress,
    prove: Callable[[Checkpoint, Checkpoint], Proof],
    load: Load | None,
) -> FixResult:
    """See doctor.api.fix. prove: compares logits before and after shapes change. load: a client's loader, or None."""
    plan = make_plan(source, recipe, rules, consent, facts=facts, stage=stage, progress=progress, suppress=suppress)
    before, after = (report_of(a, plan.recipe, fail_on, started) for a in (plan.before, plan.after))
    result = FixResult(plan, before, after, output)
    if in_place and any(isinstance(e, Rebase) for e in plan.overlay.edits):
        raise PlanRefused(
            _("{path}: a merged adapter is another model than the adapter, so it cannot replace it.", path=source.root),
            _("Write a copy with -o."),
        )
    # A script goes on with the output, so a checkpoint that needs no fix is linked there; one that stays broken is not.
    if dry_run or (not plan.steps and (in_place or not before.ok)):
        return result
    refuse(plan)
    if plan.needs_proof:
        result.proofs.append(prove(plan.unpadded(), plan.overlay))
    done = apply_plan(
        plan,
        output,
        rules,
        carry=carry,
        overwrite=overwrite,
        in_place=in_place,
        proofs=result.proofs,
        facts=facts,
        stage=stage,
        progress=progress,
        load=load if after.ok else None,
    )
    result.report_after = report_of(done.assessment, plan.recipe, fail_on, started)
    result.report_after.checkpoint = (
        done.output.name
    )  # it was assessed in the staging directory, which has its name now
    result.report_after.summary["path"] = str(done.output)
    result.report_after.findings += [*unproved(plan, result.proofs), *done.loading]
    result.receipt_path, result.notes = done.receipt, done.notes
    return result
