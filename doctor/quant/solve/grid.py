"""The affine grid of each group: which scale and zero point a group of weights gets, and the codes on it.

A grid is `w ~ scale * (code - zero)` with code in 0..2^bits-1. Every scale is rounded to the dtype it will be stored
in *before* any code is computed from it: codes that were chosen against a float32 scale are wrong by up to half a
unit of float16 once the scale is written. 0.0 is always on the grid (zero is an integer code).

The symmetric range is -2^(b-1) .. 2^(b-1)-1, one code longer below than above. Min-max takes
absmax / (2^(b-1) - 0.5), so both ends are cut by at most half a step; the search also looks at the shorter
and the longer scale. Taking absmax, never max - min, keeps a group without negative weights whole. A signed
scale turns a group round, so that its largest weight meets the longer end: readers multiply by the scale, whatever
its sign (llama.cpp's Q4_0 has always stored it so).

Sources: Frantar et al. 2022 (arXiv 2210.17323) §3; IST-DASLab/gptq quant.py (min-max and shrinking search).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.methods import BITS
from doctor.formats.grid import (
    Grid,
    by_column,
    contiguous_groups,
    dequantize,
    group_width,
    store_scale,
)
from doctor.quant.solve.numerics import all_finite

# What a grid is, stands in doctor/formats; who fits one finds all of it here.
__all__ = [
    "BITS",
    "FINE",
    "RATIOS",
    "REFITS",
    "Grid",
    "GridParams",
    "by_column",
    "contiguous_groups",
    "dequantize",
    "group_width",
    "quantize",
    "require_finite",
    "store_scale",
]
# Shrink factors of the min-max scale. Above 1: absmax lands on the last code on both sides (7.5/7 at 4 bits).
# Below 0.45 nothing was ever chosen at 4 bits; 2 bits reach 0.5.
RATIOS = tuple(1.10 - 0.035 * step for step in range(20))
FINE = (-0.020, -0.010, 0.010, 0.020)
REFITS = 2


@dataclass(frozen=True)
class GridParams:
    """How the grids of one linear are fitted: the arguments of grid_search.fit that do not depend on the group."""

    bits: int
    group_size: int
    sym: bool
    mse: bool
    signed: bool
    zero_min: int
    scale_dtype: torch.dtype


def require_finite(W: torch.Tensor) -> None:
    """NotQuantizable naming the first non-finite value of W[n, k] and their count."""
    if not all_finite(W):
        bad = ~torch.isfinite(W)
        row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), W.shape[1])
        raise NotQuantizable(
            _(
                "W[{row}, {column}] is {value} ({n} non-finite values): a scale needs finite values.",
                row=row,
                column=column,
                value=W[row, column].item(),
                n=int(bad.sum()),
            ),
            _("Run `doctor check`: it lists every such tensor."),
        )


def quantize(W: torch.Tensor, grid: Grid, bits: int, g_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Nearest codes u8[n, k] of W[n, k]; ties go to the even multiple of the scale.

    g_idx i32[k]: the group of each column; None for groups of neighbours.
    """
    scale, zero = by_column(grid, W.shape[1], g_idx)
    return (W.to(torch.float32) / scale).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)
