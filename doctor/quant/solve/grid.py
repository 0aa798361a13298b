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
from doctor.core.methods import GRID_BITS
from doctor.formats.grid import (
    Grid,
    by_column,
    contiguous_groups,
    dequantize,
    group_width,
)
from doctor.formats.grid import store_scale as store_in
from doctor.quant.solve.float_scale import FloatScale
from doctor.quant.solve.numerics import all_finite

# What a grid is, stands in doctor/formats; who fits one finds all of it here.
__all__ = [
    "FINE",
    "GRID_BITS",
    "RATIOS",
    "REFITS",
    "Grid",
    "GridParams",
    "by_column",
    "contiguous_groups",
    "dequantize",
    "group_width",
    "largest",
    "middle_of",
    "nearest",
    "quantize",
    "require_finite",
    "store_scale",
    "top_of",
]
# Shrink factors of the min-max scale. Above 1: absmax lands on the last code on both sides (7.5/7 at 4 bits).
# Below 0.45 nothing was ever chosen at 4 bits; 2 bits reach 0.5.
RATIOS = tuple(1.10 - 0.035 * step for step in range(20))
FINE = (-0.020, -0.010, 0.010, 0.020)
REFITS = 2
# Of 4-bit floats: absmax on 6 is 1, on 4 it is 1.5; between them and below, 8-bit scales are 6 to 12 % apart.
FLOAT_RATIOS = tuple(1.60 - 0.045 * step for step in range(20))
POWERS = (2.0, 0.5)  # of 4-bit floats under powers of two

ScaleKind = torch.dtype | FloatScale


@dataclass(frozen=True)
class GridParams:
    """How the grids of one linear are fitted: the arguments of grid_search.fit that do not depend on the group."""

    bits: int
    group_size: int
    sym: bool
    mse: bool
    signed: bool
    zero_min: int
    scale_dtype: ScaleKind
    squared: bool = False
    wide: int = 0

    @property
    def code_bits(self) -> int | None:
        """bits; None where groups differ in them."""
        return None if self.wide else self.bits

    @property
    def floats(self) -> bool:
        """Whether the levels are those of a 4-bit float, which no CUDA kernel rounds to."""
        return isinstance(self.scale_dtype, FloatScale)


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


def quantize(
    W: torch.Tensor,
    grid: Grid,
    bits: int | None,
    g_idx: torch.Tensor | None = None,
    scale_dtype: ScaleKind = torch.float16,
) -> torch.Tensor:
    """Nearest codes u8[n, k] of W[n, k]; ties go to the even multiple of the scale.

    g_idx i32[k]: the group of each column; None for groups of neighbours. scale_dtype: tells 4-bit floats.
    """
    scale, zero = by_column(grid, W.shape[1], g_idx)
    return nearest(W.to(torch.float32) / scale, zero, bits, scale_dtype).to(torch.uint8)


def nearest(x: torch.Tensor, zero: torch.Tensor, bits: int | None, scale_dtype: ScaleKind) -> torch.Tensor:
    """Codes as f32 of x f32 = w / scale, which is overwritten.

    Of 4-bit floats x is in halves: steps of 1 below 4, of 2 below 8, of 4 up to 12. Ties go to the even code.
    bits None: of symmetric groups of several widths, where a zero point says its own.
    """
    if bits is None:
        return torch.minimum(x.round_().add_(zero).clamp_(min=0), 2 * zero - 1, out=x)
    if not isinstance(scale_dtype, FloatScale):
        return x.round_().add_(zero).clamp_(0, 2**bits - 1)
    size = x.abs()
    step = 1 + (size >= 4).to(x.dtype) + 2 * (size >= 8)
    return x.clamp_(-12, 12).div_(step).round_().mul_(step).add_(zero)


def top_of(bits: int, scale_dtype: ScaleKind) -> int:
    """The largest code."""
    return 24 if isinstance(scale_dtype, FloatScale) else 2**bits - 1


def middle_of(bits: int, scale_dtype: ScaleKind) -> int:
    """The zero point of a symmetric grid."""
    return 12 if isinstance(scale_dtype, FloatScale) else 2 ** (bits - 1)


def store_scale(scale: torch.Tensor, scale_dtype: ScaleKind = torch.float16) -> torch.Tensor:
    """scale f32 > 0 rounded to what is stored, as f32; see doctor.formats.grid.store_scale."""
    return scale_dtype.snap(scale) if isinstance(scale_dtype, FloatScale) else store_in(scale, scale_dtype)


def largest(scale_dtype: ScaleKind) -> float:
    """The largest scale that is stored."""
    return scale_dtype.most if isinstance(scale_dtype, FloatScale) else torch.finfo(scale_dtype).max
