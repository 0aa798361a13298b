"""What `fix` returns: the plan, the reports before and after, and what was written."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from doctor.core.facts import CHECKPOINT
from doctor.core.finding import Finding, Place
from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe
from doctor.fixing.assess import Assessment
from doctor.fixing.plan import Plan
from doctor.fixing.proof import Proof
from doctor.lint.engine import Report
from doctor.scan.summary import summary


@dataclass
class FixResult:
    """What fix did, or would do. report_after is of the output; in a dry run, of the source read through the edits."""

    plan: Plan
    report_before: Report
    report_after: Report
    output: Path
    receipt_path: Path | None = None  # None: nothing was written
    proofs: list[Proof] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)

    @property
    def report(self) -> Report:
        return self.report_after


def report_of(assessment: Assessment, recipe: Recipe, fail_on: str, started: float) -> Report:
    """The report of an assessment. started: time.perf_counter() when the command began."""
    return Report(
        checkpoint=assessment.checkpoint.name,
        recipe=recipe,
        findings=list(assessment.findings),
        runs=assessment.runs,
        summary=summary(assessment.checkpoint, assessment.store),
        skipped_tensors=assessment.skipped,
        bytes_read=assessment.bytes_known,
        seconds=time.perf_counter() - started,
        fail_on=fail_on,
        suppressed=assessment.suppressed,
    )


def unproved(plan: Plan, proofs: list[Proof]) -> list[Finding]:
    """A warning for each step whose proof could not be run."""
    reasons = [p.detail for p in proofs if p.status == "not run"]
    return [
        Finding(
            _("{title}: done without its proof: {reason}", title=step.title, reason=reason),
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
