"""The named schemes that a recipe may give to single linears, by name; doctor/formats/schemes.py is their table."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol


class NamedFields(Protocol):
    """What a named scheme fixes and proposes of a recipe."""

    @property
    def methods(self) -> tuple[str, ...]: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def usual(self) -> Mapping[str, Any]: ...


NAMED: dict[str, NamedFields] = {}  # doctor.formats.schemes puts them here


def named(scheme: str) -> NamedFields | None:
    """The row of a scheme; None for "" and for a name that is not known. The table is imported, by name, when one is
    first asked for.
    """
    if not scheme:
        return None
    import_module("doctor.formats.schemes")
    return NAMED.get(scheme)
