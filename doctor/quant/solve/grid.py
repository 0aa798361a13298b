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

from typing import NamedTuple

import torch

from doctor.core.errors import NotQuantizable
from doctor.quant.solve import cpu
from doctor.quant.solve.hessian import all_finite

BITS = (2, 3, 4, 8)
# Shrink factors of the min-max scale. Above 1: absmax lands on the last code on both sides (7.5/7 at 4 bits).
# Below 0.45 nothing was ever chosen at 4 bits; 2 bits reach 0.5.
_RATIOS = tuple(1.10 - 0.035 * step for step in range(20))
_FINE = (-0.020, -0.010, 0.010, 0.020)
_REFITS = 2
_CHUNK_CPU = 1 << 18  # weights at a time: four float32 temporaries of 1 MiB stay in the cache of a core
_CHUNK_DEVICE = 1 << 25


class Grid(NamedTuple):
    """scale f32[n, G], each value exact in the stored dtype, never 0, negative only where `signed` was asked for;
    zero i32[n, G], 0..2^bits-1."""

    scale: torch.Tensor
    zero: torch.Tensor


def group_width(k: int, group_size: int) -> int:
    """Columns in a group: group_size, or k for -1. NotQuantizable where groups do not divide k."""
    width = k if group_size == -1 else group_size
    if width < 1 or k % width:
        raise NotQuantizable(
            f"in_features {k} is not a multiple of group_size {group_size}: every group needs the same width.",
            f"Pad in_features, or choose a group_size that divides {k}.",
        )
    return width


def contiguous_groups(k: int, group_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """g_idx i32[k] of groups of neighbours: i // group_size."""
    return (torch.arange(k, device=device) // group_width(k, group_size)).to(torch.int32)


def fit(
    W: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    mse: bool = False,
    weight: torch.Tensor | None = None,
    signed: bool = False,
    zero_min: int = 0,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """Grid of every group of W[n, k].

    mse: choose scale (and, asymmetric, zero) by the least sum of weight[j] * (W[:, j] - grid)^2 over each group,
    instead of min-max. weight f32[k] >= 0 is the cost of an error in column j: the diagonal of the Hessian when
    calibration is there, None for equal columns. signed: a symmetric group whose largest weight is positive gets a
    negative scale (needs mse; see above). zero_min = 1 for formats that store zero - 1 (GPTQ v1).
    A group of zeros gets scale 1 and the middle zero: 0/0 would be NaN and spread through dequantize.

    Raises NotQuantizable for a non-finite W (naming the first), a scale past the largest value of scale_dtype,
    or a group_size that does not divide k.
    """
    if bits not in BITS:
        raise NotQuantizable(f"bits is {bits}: a grid has {', '.join(map(str, BITS))} bits.")
    n, k = W.shape
    width = group_width(k, group_size)
    require_finite(W)
    if W.is_cuda:
        from doctor.quant.solve import kernels

        if kernels.available(W.device) is None:
            made = kernels.fit(
                W,
                bits,
                group_size,
                sym,
                mse=mse,
                weight=weight,
                signed=signed,
                zero_min=zero_min,
                scale_dtype=scale_dtype,
            )
            if torch.isfinite(made.scale).all():  # else the code below names the scale that is not
                return made
    grouped = W.to(torch.float32).reshape(n, k // width, width)
    cost = None if weight is None else weight.to(W.device, torch.float32).reshape(1, k // width, width)
    found = cpu.fit(
        grouped.reshape(n, k),
        None if cost is None else cost.reshape(k),
        width,
        *native_rule(bits, sym, mse=mse, signed=signed, zero_min=zero_min, scale_dtype=scale_dtype),
    )
    if found is not None and torch.isfinite(found[0]).all():  # where it is not, the code below names the scale
        return Grid(*found)
    scale = torch.empty(n, k // width, device=W.device)
    zero = torch.empty(n, k // width, device=W.device, dtype=torch.int32)
    rows = max(1, (_CHUNK_CPU if W.device.type == "cpu" else _CHUNK_DEVICE) // k)
    for first in range(0, n, rows):
        part = grouped[first : first + rows]
        turn = _turn(part) if sym and mse and signed else None
        part = part if turn is None else part * turn
        found = _minmax(part, bits, sym, zero_min, scale_dtype)
        if mse:
            found = _search(part, cost, found, bits, sym, zero_min, scale_dtype)
        scale[first : first + rows] = (found[0] if turn is None else found[0] * turn)[..., 0]
        zero[first : first + rows] = found[1][..., 0].to(torch.int32)
    return Grid(scale, zero)


def native_rule(
    bits: int, sym: bool, *, mse: bool, signed: bool, zero_min: int, scale_dtype: torch.dtype
) -> tuple[cpu.Rule, torch.Tensor]:
    """The arguments of `fit` as the native loops take them: (rule, candidates f32[ratios + fine])."""
    return (
        cpu.rule(
            bits,
            sym,
            turn=signed,
            mse=mse,
            zero_min=zero_min,
            dtype=scale_dtype,
            ratios=len(_RATIOS),
            fine=len(_FINE),
            refits=_REFITS,
        ),
        torch.tensor([*_RATIOS, *_FINE]),
    )


def require_finite(W: torch.Tensor) -> None:
    """NotQuantizable naming the first non-finite value of W[n, k] and their count."""
    if not all_finite(W):
        bad = ~torch.isfinite(W)
        row, column = divmod(int(bad.flatten().to(torch.uint8).argmax()), W.shape[1])
        raise NotQuantizable(
            f"W[{row}, {column}] is {W[row, column].item()} ({int(bad.sum())} non-finite values): "
            "a scale needs finite values.",
            "Run `doctor check`: it lists every such tensor.",
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
            f"a group needs the scale {scale.max().item():.6g}, and {str(dtype)[6:]} ends at "
            f"{torch.finfo(dtype).max:.6g}: the scale would be stored as Inf.",
            "Run `doctor check` for the tensor's outliers, or keep this linear in 16 bits.",
        )
    return stored.clamp_min_(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)


def _by_column(grid: Grid, k: int, g_idx: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if g_idx is None:
        width = group_width(k, k // grid.scale.shape[1])
        return grid.scale.repeat_interleave(width, 1), grid.zero.to(torch.float32).repeat_interleave(width, 1)
    index = g_idx.to(torch.int64)
    return grid.scale[:, index], grid.zero.to(torch.float32)[:, index]


def _turn(part: torch.Tensor) -> torch.Tensor:
    """-1 for groups whose largest weight is positive, else 1, f32[r, G, 1]: the sign that puts it at the longer end."""
    return torch.where(part.amax(-1, keepdim=True) > -part.amin(-1, keepdim=True), -1.0, 1.0)


def _minmax(
    part: torch.Tensor, bits: int, sym: bool, zero_min: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale f32[r, G, 1] and zero f32[r, G, 1] that span part f32[r, G, g]."""
    top, half = 2**bits - 1, float(2 ** (bits - 1))
    if sym:
        span = part.abs().amax(-1, keepdim=True)
        scale = span / (half - 0.5)
    else:
        low, high = part.amin(-1, keepdim=True).clamp_max(0), part.amax(-1, keepdim=True).clamp_min(0)
        span = high - low
        scale = span / top
    scale = store_scale(torch.where(span > 0, scale, torch.ones_like(scale)), dtype)
    if sym:
        return scale, torch.full_like(scale, half)
    zero = (-low / scale).round_().clamp_(zero_min, top)
    return scale, torch.where(span > 0, zero, torch.full_like(zero, half))


def _search(
    part: torch.Tensor,
    cost: torch.Tensor | None,
    start: tuple[torch.Tensor, torch.Tensor],
    bits: int,
    sym: bool,
    zero_min: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least weighted squared error over shrink factors, then zero points, then a least-squares refit of the scale.

    Every candidate is rounded to the stored dtype first, so the error that is compared is the error that is kept.
    """
    top = 2**bits - 1
    first, zero = start
    best = [first, zero, _error(part, cost, first, zero, top)]

    def consider(scale: torch.Tensor, zero: torch.Tensor) -> None:
        scale = store_scale(scale.clamp_max(torch.finfo(dtype).max), dtype)
        error = _error(part, cost, scale, zero, top)
        better = error < best[2]
        for slot, value in enumerate((scale, zero, error)):
            best[slot] = torch.where(better, value, best[slot])

    live = part.abs().amax(-1, keepdim=True) > 0
    for ratio in _RATIOS:
        consider(first * ratio, zero)
    for step in _FINE:
        consider(torch.where(live, best[0] + first * step, best[0]), best[1])
    if not sym:
        for step in (-1, 1):
            consider(best[0], (best[1] + step).clamp_(zero_min, top))
    for _ in range(_REFITS):
        level = (part / best[0]).round_().add_(best[1]).clamp_(0, top).sub_(best[1])
        weighted = level if cost is None else level * cost
        norm = (weighted * level).sum(-1, keepdim=True)
        refit = (weighted * part).sum(-1, keepdim=True) / norm
        consider(torch.where((norm > 0) & (refit > 0), refit, best[0]), best[1])
    return torch.where(live, best[0], first), torch.where(live, best[1], zero)


def _error(
    part: torch.Tensor, cost: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Weighted squared rounding error f32[r, G, 1]."""
    off = (part / scale).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(scale).sub_(part).square_()
    return (off if cost is None else off.mul_(cost)).sum(-1, keepdim=True)
