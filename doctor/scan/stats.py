"""Exact counters over the values of a tensor or of a part of it, and how they merge. The scan makes them."""

from __future__ import annotations

from typing import NamedTuple


class Stats(NamedTuple):  # not a dataclass: one is made for each MiB, and again to merge it
    """What one pass over the values of a tensor, or of a chunk of it, counts.

    n_subnormal is of the tensor's own type. n_fp16_overflow counts finite values that become Inf in fp16,
    n_fp16_underflow non-zero ones that become 0. Bounds and sums are over finite values and 0.0 where there are none;
    sums are float64 and may themselves be Inf for F64. first_nonfinite is a flat index in the whole tensor, or -1.
    """

    numel: int = 0
    n_nan: int = 0
    n_inf: int = 0
    n_zero: int = 0
    n_subnormal: int = 0
    n_fp16_overflow: int = 0
    n_fp16_underflow: int = 0
    absmax: float = 0.0
    min: float = 0.0
    max: float = 0.0
    sum: float = 0.0
    sumsq: float = 0.0
    first_nonfinite: int = -1

    @property
    def n_finite(self) -> int:
        return self.numel - self.n_nan - self.n_inf

    def merge(self, later: Stats) -> Stats:
        """The statistics of this chunk followed by `later`."""
        if not self.n_finite or not later.n_finite:
            bounds = self if self.n_finite else later
            low, high = bounds.min, bounds.max
        else:
            low, high = min(self.min, later.min), max(self.max, later.max)
        return Stats(
            self.numel + later.numel,
            self.n_nan + later.n_nan,
            self.n_inf + later.n_inf,
            self.n_zero + later.n_zero,
            self.n_subnormal + later.n_subnormal,
            self.n_fp16_overflow + later.n_fp16_overflow,
            self.n_fp16_underflow + later.n_fp16_underflow,
            max(self.absmax, later.absmax),
            low,
            high,
            self.sum + later.sum,
            self.sumsq + later.sumsq,
            self.first_nonfinite if self.first_nonfinite >= 0 else later.first_nonfinite,
        )


EMPTY = Stats()


class Outlier(NamedTuple):
    """place: index of the column or entry. times: its magnitude over the median one's."""

    place: int
    times: float
