"""Bits of single linears: a quantization_config may give some of them others than the rest, by name or by pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.core.methods import GRID_BITS
from doctor.core.patterns import Pattern


class Widths:
    """Bits of the linears that have others than the rest, by name or by a pattern that a name must begin with."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}  # looked up: a mixture may name thousands of linears one by one
        self._patterns: list[tuple[Pattern, int]] = []

    @classmethod
    def of_patterns(cls, pairs: Iterable[tuple[str, object]]) -> Widths:
        """From (pattern, bits); what is no width is passed over. Raises Unavailable for a pattern that is none."""
        found = cls()
        for pattern, bits in pairs:
            if type(bits) is int and bits in GRID_BITS:
                try:
                    found.add(pattern, bits)
                except re.error as error:
                    raise Unavailable(
                        _(
                            "quantization_config names linears by {pattern!r}, which is no pattern: {error}",
                            pattern=pattern,
                            error=str(error),
                        )
                    ) from None
        return found

    def add(self, pattern: str, bits: int) -> None:
        """Raises re.error for a pattern that is none."""
        name = re.sub(r"\\(.)", r"\1", pattern[1:-1])
        if pattern == exactly(name):
            self._names.setdefault(name, bits)
        else:
            self._patterns.append((Pattern(pattern), bits))

    def of(self, module: str, common: int) -> int:
        """The bits of a linear, `common` where it has none of its own."""
        if module in self._names:
            return self._names[module]
        return next((bits for pattern, bits in self._patterns if pattern.match(module)), common)


def exactly(name: str) -> str:
    """The pattern of one name."""
    return f"^{re.escape(name)}$"


def own_entries(raw: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(name or pattern, what is its own) of raw[key], without those that are left out ("-:").

    Raises Unavailable where that is more than a width; what stays in floats has none.
    """
    own = raw.get(key) or {}
    if not isinstance(own, Mapping) or any(
        not isinstance(value, Mapping)
        or (not _in_floats(value) and any(k != "bits" and v != raw.get(k, v) for k, v in value.items()))
        for name, value in own.items()
        if not name.startswith("-:")
    ):
        raise Unavailable(_("linears differ in more than their width ({key}): their shapes are not checked", key=key))
    return [(name, value) for name, value in own.items() if not name.startswith("-:")]


def _in_floats(own: Mapping[str, Any]) -> bool:
    bits = own.get("bits")
    return isinstance(bits, int) and bits >= 16
