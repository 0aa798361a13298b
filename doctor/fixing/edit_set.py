"""Edits of several rules as one set: the same edit counts once, different edits of one target are refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from doctor.core.errors import PlanRefused
from doctor.core.messages import Message, _
from doctor.edits.json_edits import json_shown
from doctor.edits.kinds import PHASES, Edit, PadTensor, RemoveJson, SetJson, SetRecipe


def compose(owned: Iterable[tuple[str, Edit]]) -> list[Edit]:
    """(rule code, edit) pairs as one list in the order of PHASES, whatever the order of the input.

    Raises PlanRefused where two different edits have one target, naming both rules and both values.
    """
    accepted = EditSet()
    for code, edit in owned:
        rival = accepted.rival(edit)
        if rival is not None:
            raise PlanRefused(
                conflict(code, edit, *rival),
                _("Choose one: --only {code} or --only {other}.", code=code, other=rival[0]),
            )
        accepted.add(code, edit)
    return accepted.edits()


class EditSet:
    """Accepted edits by target. A mixture of experts has tens of thousands, so rivals are looked up, not searched
    for.
    """

    def __init__(self, other: EditSet | None = None):
        self.by_target: dict[str, tuple[str, Edit]] = dict(other.by_target) if other else {}
        # Those that may contain another JSON value, or be inside one.
        self.values: list[tuple[str, SetJson | RemoveJson]] = list(other.values) if other else []

    def add(self, code: str, edit: Edit) -> None:
        if edit.target not in self.by_target:
            self.by_target[edit.target] = (code, edit)
            if isinstance(edit, (SetJson, RemoveJson)):
                self.values.append((code, edit))

    def rival(self, edit: Edit) -> tuple[str, Edit] | None:
        """(code, edit) with this edit's target, or of a JSON value around or inside its own, that is not the same
        edit.
        """
        same = self.by_target.get(edit.target)
        if same is not None:
            return None if same[1] == edit else same
        if not isinstance(edit, (SetJson, RemoveJson)):
            return None
        return next((v for v in self.values if _nested(edit, v[1])), None)

    def edits(self) -> list[Edit]:
        return in_phases(edit for _code, edit in self.by_target.values())


def in_phases(edits: Iterable[Edit]) -> list[Edit]:
    """Edits in the order in which they are applied."""
    return sorted(edits, key=lambda e: (PHASES.index(e.phase), e.target))


def conflict(code: str, edit: Edit, other_code: str, other: Edit) -> Message:
    """What is said of two different edits of one target."""
    return _(
        "{target}: {code} wants {value}, {other} wants {rival}; one target takes one edit.",
        target=edit.target,
        code=code,
        value=_wish(edit),
        other=other_code,
        rival=_wish(other),
    )


def _nested(one: SetJson | RemoveJson, other: SetJson | RemoveJson) -> bool:
    if one.file != other.file:
        return False
    return (one.pointer + "/").startswith(other.pointer + "/") or (other.pointer + "/").startswith(one.pointer + "/")


def _wish(edit: Edit) -> str:
    if isinstance(edit, (SetJson, SetRecipe)):
        return json_shown(edit.value)
    if isinstance(edit, RemoveJson):
        return _("it removed")
    if isinstance(edit, PadTensor):
        size: str = str(edit.size)
        if edit.blocks > 1:
            size = _("{size} in {parts} parts", size=edit.size, parts=edit.blocks)
        return size if edit.spread else _("{size}, zeros at the end", size=size)
    return f"{type(edit).__name__}({', '.join(str(getattr(edit, f.name)) for f in fields(edit) if f.name != 'tensor')})"
