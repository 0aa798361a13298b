"""What the user allows a fix to do."""

from dataclasses import dataclass

from doctor.core.finding import Fix
from doctor.edits.kinds import RECIPE_EDITS


@dataclass(frozen=True)
class Consent:
    """What the user allows.

    unsafe: every unsafe fix, except those that must be named. codes: unsafe fixes of these rules, those that must be
    named included. only: no fix of any other rule. recipe: edits of the recipe too (in a quantizer's run; a directory
    has none).
    """

    unsafe: bool = False
    codes: frozenset[str] = frozenset()
    only: frozenset[str] = frozenset()
    recipe: bool = False

    def allows(self, code: str, fix: Fix) -> bool:
        if self.only and code not in self.only:
            return False
        return fix.safety == "safe" or code in self.codes or (self.unsafe and not fix.by_name)

    def can_carry_out(self, fix: Fix | None) -> bool:
        """Whether edits can do anything here, asked for or not."""
        return (
            fix is not None
            and bool(fix.edits)
            and fix.safety != "manual"
            and (self.recipe or not any(isinstance(e, RECIPE_EDITS) for e in fix.edits))
        )
