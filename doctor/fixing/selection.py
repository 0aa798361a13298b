"""Which fixes a plan carries out now, and why not the others."""

from collections.abc import Iterable

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.core.finding import Finding, Fix
from doctor.core.messages import _
from doctor.edits.kinds import Edit, TensorEdit
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.consent import Consent
from doctor.fixing.edit_set import EditSet, compose, conflict
from doctor.fixing.step import Step, fix_of


class Selection:
    """The fixes accepted so far, and why others are not."""

    def __init__(self, source: Checkpoint, consent: Consent):
        self.source, self.consent = source, consent
        self.steps: dict[tuple[str, str], Step] = {}
        self.accepted = EditSet()
        self.rejected: dict[tuple[str, str, str], str] = {}  # (code, title, subject) -> why edits do not fit the files

    def accept(self, findings: list[Finding]) -> list[Edit]:
        """Accept every fix of these findings that can go now; returns the edits that are new."""
        allowed = [f for f in findings if self.consent.can_carry_out(f.fix) and self.consent.allows(f.code, fix_of(f))]
        accepted, chosen = self._collect(allowed, findings, one_by_one=False)
        try:
            EditedCheckpoint(self.source, accepted.edits())
        except PlanRefused:  # some edit does not fit the files: find out which, and go on with the others
            accepted, chosen = self._collect(allowed, findings, one_by_one=True)
        new = [edit for t, (_code, edit) in accepted.by_target.items() if t not in self.accepted.by_target]
        self.accepted = accepted
        if new:
            for item in chosen:
                self.steps.setdefault((item.code, fix_of(item).title), Step.of(item)).add(item)
        return new

    def _collect(
        self, allowed: list[Finding], findings: list[Finding], one_by_one: bool
    ) -> tuple[EditSet, list[Finding]]:
        accepted, chosen = EditSet(self.accepted), []
        for item in allowed:
            fix = fix_of(item)
            if self.blocked(item, findings, accepted):
                continue
            try:
                compose((item.code, e) for e in fix.edits)
            except PlanRefused as error:
                self.rejected[item.code, fix.title, item.subject] = error.message
                continue
            trial = EditSet(accepted) if one_by_one else accepted
            for edit in fix.edits:
                trial.add(item.code, edit)
            if one_by_one:
                try:
                    EditedCheckpoint(self.source, trial.edits())
                except PlanRefused as error:
                    self.rejected[item.code, fix.title, item.subject] = error.message
                    continue
            accepted = trial
            chosen.append(item)
        return accepted, chosen

    def blocked(self, item: Finding, findings: list[Finding], accepted: EditSet | None = None) -> str:
        """Why a fix cannot go now; "" where it can."""
        fix = fix_of(item)
        if item.consequence_of and not (fix.by_name and self._stands_alone(item, findings)):
            return _("follows from {code}", code=item.consequence_of)
        waits = unmet(fix, findings)
        if waits:
            return _("waits for {codes}", codes=", ".join(waits))
        for edit in fix.edits:
            rival = (accepted or self.accepted).rival(edit)
            if rival is not None:
                return _("conflict: {conflict}", conflict=conflict(item.code, edit, *rival))
        return self.rejected.get((item.code, fix.title, item.subject), "")

    def _stands_alone(self, item: Finding, findings: list[Finding]) -> bool:
        """Whether no cause of a consequence has a fix: one that was asked for by name is then the only way."""
        return not any(f.code == item.consequence_of and f.fix is not None and f.fix.edits for f in findings)


def unmet(fix: Fix, findings: Iterable[Finding]) -> list[str]:
    """Codes the fix needs gone that still have a finding on a tensor it edits, or on no tensor in particular."""
    tensors = {e.tensor for e in fix.edits if isinstance(e, TensorEdit)}
    return sorted(
        {
            f.code
            for f in findings
            if f.code in fix.needs and (not tensors or f.where.tensor is None or f.where.tensor in tensors)
        }
    )
