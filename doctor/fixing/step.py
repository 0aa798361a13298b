"""One line of a fix plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from doctor.core.finding import Finding, Fix
from doctor.edits.kinds import Edit, GrowRows, PadTensor


def fix_of(item: Finding) -> Fix:
    """The fix of a finding that has one. Raises ValueError for one without."""
    if item.fix is None:
        raise ValueError(f"{item.code}: this finding has no fix")
    return item.fix


@dataclass
class Step:
    """One line of the plan: the fixes of one rule with one title. `waits` says why it is not carried out now.

    diffs: JSON or text file -> lines of a diff without context. tensors: (names with layer numbers folded, dtype, old
    shape or None, new shape or None).
    """

    code: str
    name: str
    safety: str
    title: str
    edits: list[Edit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    number: int = 0
    waits: str = ""
    needs: tuple[str, ...] = ()
    after: int | None = None  # number of the earlier step that changes the same file
    diffs: dict[str, list[str]] = field(default_factory=dict)
    tensors: list[tuple[str, str, tuple[int, ...] | None, tuple[int, ...] | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _targets: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, item: Finding) -> Step:
        """A step for the fix of this finding, still without findings and edits."""
        fix = fix_of(item)
        return cls(item.code, item.name, fix.safety, fix.title, needs=fix.needs)

    def add(self, item: Finding) -> None:
        """Add one more finding that this step fixes; an edit shared with another finding is added once."""
        self.findings.append(item)
        for edit in fix_of(item).edits:
            if edit.target not in self._targets:
                self._targets.add(edit.target)
                self.edits.append(edit)

    @property
    def pads(self) -> bool:
        """Whether it changes shapes and claims that the outputs stay the same."""
        return any(isinstance(e, (PadTensor, GrowRows)) for e in self.edits)
