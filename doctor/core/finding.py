"""What a rule yields: a finding at a place, with the fix that removes it. Plain data that every report renders."""

from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("error", "warning", "info")
CERTAINTIES = ("certain", "likely", "hint")


@dataclass(frozen=True)
class Place:
    """Where a finding points: a file, and in it a JSON value, or a tensor and one element of it.

    note: what stands beside the `^^^^` of the frame. The engine fills in line, column, length and frame from the file.
    """

    file: str
    pointer: str | None = None
    tensor: str | None = None
    index: tuple[int, ...] | None = None
    byte: int | None = None
    note: str = ""
    line: int | None = None
    column: int | None = None
    length: int | None = None
    frame: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Fix:
    """A cure: edits and how safe they are. "manual" has no edits: the title is the sentence for the user.

    by_name: never part of a blanket --unsafe-fixes, because it invents content. needs: codes that must be gone first.
    """

    title: str
    edits: tuple[Any, ...] = ()
    safety: str = "safe"
    by_name: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One defect at one place. `message` is one sentence with the numbers; `facts_table` rows are the arithmetic behind
    it.
    """

    message: str
    where: Place
    evidence: dict = field(default_factory=dict)
    fix: Fix | None = None
    advice: str = ""
    facts_table: tuple[tuple[str, ...], ...] = ()
    strip: dict | None = None  # {row label: one number per block}: drawn as a picture across blocks
    code: str = ""
    name: str = ""
    severity: str = ""
    certainty: str = ""
    subject: str = ""
    consequence_of: str = ""  # code of the finding that explains this one
    baseline_state: str = ""  # new, unchanged or absent against the baseline; "" without one
    suppression: dict | None = None  # reason, origin and from_checkpoint of the entry that suppressed it

    @property
    def target(self) -> str:
        """What it is about, for people: a tensor, a key, or a file."""
        return self.where.tensor or (
            f"{self.where.file}#{self.where.pointer}" if self.where.pointer is not None else self.where.file
        )
