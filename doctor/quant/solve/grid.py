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
from typing import NamedTuple

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.solve.numerics import all_finite

BITS = (2, 3, 4, 8)
# Shrink factors of the min-max scale. Above 1: absmax lands on the last code on both sides (7.5/7 at 4 bits).
# Below 0.45 nothing was ever chosen at 4 bits; 2 bits reach 0.5.
RATIOS = tuple(1.10 - 0.035 * step for step in range(20))
FINE = (-0.020, -0.010, 0.010, 0.020)
REFITS = 2


class Grid(NamedTuple):
    """scale f32[n, G], each value exact in the stored dtype, never 0, negative only where `signed` was asked for;
    zero i32[n, G], 0..2^bits-1."""

    scale: torch.Tensor
    zero: torch.Tensor


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


def group_width(k: int, group_size: int) -> int:
    """Columns in a group: group_size, or k for -1. NotQuantizable where groups do not divide k."""
    width = k if group_size == -1 else group_size
    if width < 1 or k % width:
        raise NotQuantizable(
            _(
                "in_features {k} is not a multiple of group_size {group_size}: every group needs the same width.",
                k=k,
                group_size=group_size,
            ),
            _("Pad in_features, or choose a group_size that divides {k}.", k=k),
        )
    return width


def contiguous_groups(k: int, group_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """g_idx i32[k] of groups of neighbours: i // group_size."""
    return (torch.arange(k, device=device) // group_width(k, group_size)).to(torch.int32)


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
    scale, zero = _by_column(grid, W.shape[1], g_idx)
    return (W.to(torch.float32) / scale).round_().add_(zero).clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: torch.Tensor, grid: Grid, g_idx: torch.Tensor | None = None) -> torch.Tensor:
    """scale * (code - zero), f32[n, k], of codes u8[n, k]."""
    scale, zero = _by_column(grid, codes.shape[1], g_idx)
    return (codes.to(torch.float32) - zero) * scale


def store_scale(scale: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """scale f32 rounded to what `dtype` can hold, as f32; never 0, NotQuantizable where it would become Inf.

    A scale under half the smallest subnormal becomes that subnormal (5.96e-8 in float16): its weights are smaller
    than any float16, so most of them take the code of 0.0, which is also what casting them would give.
    """
    stored = scale.to(dtype).to(torch.float32)
    if not torch.isfinite(stored).all():
        raise NotQuantizable(
            _(
                "a group needs the scale {scale:.6g}, and {dtype} ends at {most:.6g}: the scale would be stored "
                "as Inf.",
                scale=scale.max().item(),
                dtype=str(dtype)[6:],
                most=torch.finfo(dtype).max,
            ),
            _("Run `doctor check` for the tensor's outliers, or keep this linear in 16 bits."),
        )
    return stored.clamp_min_(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def _by_column(grid: Grid, k: int, g_idx: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if g_idx is None:
        width = group_width(k, k // grid.scale.shape[1])
        return grid.scale.repeat_interleave(width, 1), grid.zero.to(torch.float32).repeat_interleave(width, 1)
    index = g_idx.to(torch.int64)
    return grid.scale[:, index], grid.zero.to(torch.float32)[:, index]
