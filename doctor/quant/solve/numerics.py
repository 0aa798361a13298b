"""Numeric helpers that every solver needs: a finite check in one pass, and float32 products without TF32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from doctor.quant.solving_budget import TILE

# LAPACK's and BLAS's indices have 32 bits: k^2 entries pass them one column later. Wider matrices go by tiles.
LAPACK_MOST = 46_340


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32: TF32 in a product that feeds H or the error feedback costs what calibration
    gains.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def row_chunks(shape: Sequence[int], most: int) -> Iterator[slice]:
    """Rows of a float32 matrix of shape [n, k] in runs of at most `most` bytes, one row at least."""
    n, k = shape
    rows = max(1, most // (4 * k))
    return (slice(first, min(n, first + rows)) for first in range(0, n, rows))


def tiles_of(k: int, tile: int | None = None) -> list[slice]:
    """Rows or columns of a [k, k] matrix in runs of `tile`, by default TILE."""
    tile = tile or TILE
    return [slice(begin, min(k, begin + tile)) for begin in range(0, k, tile)]


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, in one pass: both reach the bounds."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def nonfinite_columns(parts: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """How many values of each column of rows [m, k] are NaN or Inf, i64[k]; None where none is."""
    found = None
    for rows in parts:
        if not all_finite(rows):
            count = (~torch.isfinite(rows)).sum(0)
            found = count if found is None else found + count
    return found


class HasDiagonal(Protocol):
    """A matrix, or what holds one."""

    def diagonal(self) -> torch.Tensor: ...


def live_mean(H: HasDiagonal) -> float:
    """Mean of diag(H) over live columns; 0.0 when all are dead.

    Dead columns do not count: zero padding would lower the mean, hence the damping, hence change the codes of columns
    that padding did not touch.
    """
    diagonal = H.diagonal().to(torch.float64)
    live = diagonal > 0
    return float(diagonal[live].mean()) if live.any() else 0.0
