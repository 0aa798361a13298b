"""The values that a quantized weight may take: an affine grid, `scale * (code - zero)`, or levels under a scale.

Every scale is rounded to the element type that it is stored in *before* any code is computed from it: codes that were
chosen against a float32 scale are wrong by up to half a unit of float16 once the scale is written.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from doctor.core.errors import NotQuantizable
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.formats.arrays import Array, cast, counted, is_torch, repeated, taken

if TYPE_CHECKING:
    import torch


E2M1, E4M3 = "e2m1", "e4m3"
NEXT_WIDTH = {2: 3, 3: 4, 4: 5, 5: 6, 6: 8}  # of EXL2, whose kernels have no others


class Grid(NamedTuple):
    """scale f32[n, G], each value exact in the stored dtype, never 0, negative only where GridKind says signed;
    zero i32[n, G], 0..2^bits-1. NumPy arrays or torch tensors.

    levels: GridKind.levels. divisor f32[1]: what stored scales are divided by, None where by nothing; of squared scales
    f32[G], what the squares of each group are multiplied by.
    """

    scale: Array
    zero: Array
    levels: str = ""
    divisor: Array | None = None


@dataclass(frozen=True)
class GridKind:
    """What a format lets the quantizer choose from.

    levels: "" for an affine grid of codes 0..2^bits-1 with a zero point. E2M1: the 15 values of a 4-bit float, as codes
    0..24 of halves with zero point 12, of which only those values are taken: so all arithmetic of affine grids holds,
    with half the scale. E4M3: codes are the bits of an 8-bit float. zero_min: the smallest zero point that can be
    stored. scale_dtype: what a scale is stored in, by safetensors' name. divided: stored scales are divided by one
    float32 of the tensor. squared: a scale is the square of 1..16 times a float16 that all rows of a group share.
    signed: a symmetric group may have a negative scale, which readers multiply by as by any other. tile: (rows,
    columns) under one scale; () one row's group_size. wide: percent of the columns in the next width of NEXT_WIDTH.
    """

    bits: int
    group_size: int
    sym: bool
    levels: str = ""
    zero_min: int = 0
    scale_dtype: str = "F16"
    divided: bool = False
    squared: bool = False
    signed: bool = False
    tile: tuple[int, int] | tuple[()] = ()
    wide: int = 0

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """scale_dtype as torch's."""
        import torch

        from doctor.checkpoint.dtypes import DTYPES

        return getattr(torch, str(DTYPES[self.scale_dtype].torch))


def group_width(k: int, group_size: int) -> int:
    """Columns in a group: group_size, or k for -1. NotQuantizable where groups do not divide k."""
    width = k if group_size == -1 else group_size
    if width < 1 or k % width:
        raise NotQuantizable(
            _(
                "in_features {width} is not a multiple of group_size {group_size}: every group needs the same width.",
                width=k,
                group_size=group_size,
            ),
            _("Pad in_features, or choose a group_size that divides {width}.", width=k),
        )
    return width


def contiguous_groups(k: int, group_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """g_idx i32[k] of groups of neighbours: i // group_size."""
    import torch

    return (torch.arange(k, device=device) // group_width(k, group_size)).to(torch.int32)


def group_bits(bits: int, wide: int, groups: int) -> tuple[int, ...]:
    """The width of each group: of `wide` percent of them, rounded up, the next one."""
    first = -(-wide * groups // 100)
    return (NEXT_WIDTH[bits],) * first + (bits,) * (groups - first) if wide else (bits,) * groups


def neighbours(k: int, groups: int, like: Array) -> Array:
    """g_idx i32[k] of `groups` equal groups of neighbours, where and of which library `like` is."""
    return cast(counted(k, like) // (k // groups), "I32")


def dequantize(codes: Array, grid: Grid, g_idx: Array | None = None) -> Array:
    """scale * (code - zero), f32[n, k], of codes u8[n, k]. g_idx i32[k]: each column's group, None for neighbours.
    Codes of E4M3 are their own values.
    """
    scale, zero = by_column(grid, codes.shape[1], g_idx)
    if grid.levels == E4M3:
        return cast(as_e4m3(codes), "F32") * scale
    return (cast(codes, "F32") - zero) * scale


def as_e4m3(codes: Array) -> Array:
    """The 8-bit floats whose bits codes u8 are; of NumPy codes, their values in float32."""
    if is_torch(codes):
        return codes.view(sys.modules["torch"].float8_e4m3fn)
    return e4m3_values()[codes]


def e4m3_values() -> Array:
    """f32[256]: value of each E4M3 code."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * np.exp2(exponent - 7.0))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


def by_column(grid: Grid, k: int, g_idx: Array | None) -> tuple[Array, Array]:
    """(scale f32[n, k], zero f32[n, k]) of each column."""
    zero = cast(grid.zero, "F32")
    if g_idx is None:
        width = group_width(k, k // grid.scale.shape[1])
        return repeated(grid.scale, width, 1), repeated(zero, width, 1)
    return taken(grid.scale, g_idx, 1), taken(zero, g_idx, 1)


def squared_scale(roots: Array, base: Array) -> Array:
    """f32[n, G]: the scale that EXL2's kernels compute of roots 1..16 [n, G] and base f32[G], both products rounded to
    float16.
    """
    return cast(cast(cast(cast(roots * roots, "F16"), "F32") * base, "F16"), "F32")


def store_scale(scale: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """scale f32 rounded to what `dtype` (float16) can hold, as f32; never 0, NotQuantizable where it would become Inf.

    A scale under half the smallest subnormal becomes that subnormal (5.96e-8 in float16): its weights are smaller
    than any float16, so most of them take the code of 0.0, which is also what casting them would give.
    """
    import torch

    dtype = dtype or torch.float16
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


def stored_exactly(scale: Array, dtype: str) -> Array:
    """scale in its stored dtype; NotQuantizable where that changes a value, since codes were chosen against it."""
    stored = cast(scale, dtype)
    off = int((cast(stored, "F32") != scale).sum())
    if off:
        raise NotQuantizable(
            _(
                "{off} of {count} scales are not exact in {dtype}: codes were chosen against other scales than would "
                "be stored.",
                off=off,
                count=scale.numel() if is_torch(scale) else scale.size,
                dtype=_NAMES.get(dtype, dtype),
            ),
            _("Fit the grid with this scale_dtype."),
        )
    return stored


_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
