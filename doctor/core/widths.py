"""Widths of a linear as one number: 4 is 4 bits; 4.1 is 4 bits with a tenth of the columns in the next width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def width_of(bits: int, wide: int) -> float:
    """bits, and wide as hundredths."""
    return bits + wide / 100 if wide else bits


def split_width(width: float) -> dict[str, Any]:
    """The fields of a recipe that are this width."""
    bits, wide = divmod(round(100 * width), 100)
    return {"bits": bits, "wide": wide}


def widths_from(bits: Sequence[int], wide: Sequence[int]) -> tuple[float, ...]:
    """Every width, rising. wide: percents of the columns, for all but the largest of bits."""
    mixed = (width_of(one, share) for one in bits if one < max(bits) for share in wide)
    return tuple(sorted([*bits, *mixed]))
