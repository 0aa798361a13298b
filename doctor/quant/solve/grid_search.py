"""Fits the grid of each group of a weight: by minimum and maximum, or by the least weighted squared rounding error.

Three implementations of one search: CUDA kernels (cuda/grid_search.cu), native loops (cpu/solve.c) and the torch code
here, which defines the result. The first that can run on the tensor's device is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.formats.grid import contiguous_groups, group_bits
from doctor.quant.solve import cpu, cuda
from doctor.quant.solve.float_scale import FloatScale
from doctor.quant.solve.grid import (
    FINE,
    FLOAT_RATIOS,
    GRID_BITS,
    POWERS,
    RATIOS,
    REFITS,
    Grid,
    GridParams,
    ScaleKind,
    group_width,
    largest,
    middle_of,
    nearest,
    require_finite,
    store_scale,
    top_of,
)
from doctor.quant.solve.squared_scale import snapped

_CHUNK_CPU = 1 << 18  # weights at a time: four float32 temporaries of 1 MiB stay in the cache of a core
_CHUNK_DEVICE = 1 << 25


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
    scale_dtype: ScaleKind = torch.float16,
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
    if bits not in GRID_BITS:
        raise NotQuantizable(
            _("bits is {bits}: a grid has {widths} bits.", bits=bits, widths=", ".join(map(str, GRID_BITS)))
        )
    n, k = W.shape
    width = group_width(k, group_size)
    require_finite(W)
    if W.is_cuda and cuda.available(W.device) is None and isinstance(scale_dtype, torch.dtype):
        fitted = cuda.fit(
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
        if torch.isfinite(fitted.scale).all():  # else the code below names the scale that is not finite
            return fitted
    grouped = W.to(torch.float32).reshape(n, k // width, width)
    cost = None if weight is None else weight.to(W.device, torch.float32).reshape(1, k // width, width)
    found = cpu.fit(
        grouped.reshape(n, k),
        None if cost is None else cost.reshape(k),
        width,
        *native_grid_params(bits, sym, mse=mse, signed=signed, zero_min=zero_min, scale_dtype=scale_dtype),
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


def fit_with(params: GridParams, W: torch.Tensor, weight: torch.Tensor | None, group_size: int | None = None) -> Grid:
    """`fit` of W f32[n, k] with weight f32[k], all rows of a linear where scales are squared; group_size replaces the
    one of params. Groups of several widths stand in order, the wide ones first.
    """
    if params.wide:
        return _fit_runs(params, W, weight)
    found = fit(
        W,
        params.bits,
        params.group_size if group_size is None else group_size,
        params.sym,
        mse=params.mse,
        weight=weight,
        signed=params.signed,
        zero_min=params.zero_min,
        scale_dtype=params.scale_dtype,
    )
    return snapped(found, W, weight, params.bits) if params.squared else found


def _fit_runs(params: GridParams, W: torch.Tensor, weight: torch.Tensor | None) -> Grid:
    """`fit_with` of the groups of each width by themselves."""
    width = group_width(W.shape[1], params.group_size)
    runs = Counter(group_bits(params.bits, params.wide, W.shape[1] // width))
    grids, begin = list[Grid](), 0
    for bits, count in runs.items():
        own = slice(begin, begin := begin + count * width)
        plain = replace(params, bits=bits, wide=0)
        grids.append(fit_with(plain, W[:, own], None if weight is None else weight[own]))
    bases = [grid.divisor for grid in grids if grid.divisor is not None]
    return Grid(
        torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1), "", torch.cat(bases)
    )


def fit_owned(params: GridParams, W: torch.Tensor, weight: torch.Tensor | None, g_idx: torch.Tensor) -> Grid:
    """`fit_with` where g_idx i32[k] says the group of each column."""
    if not params.wide:
        return fit_with(params, W, weight)  # groups of neighbours
    by_group = torch.argsort(g_idx, stable=True)
    return fit_with(params, W[:, by_group], None if weight is None else weight[by_group])


def owners(params: GridParams, size: torch.Tensor) -> torch.Tensor:
    """g_idx i32[k]: groups of neighbours; of several widths, of columns by falling size f32[k], so that the wide groups
    hold the largest.
    """
    found = contiguous_groups(len(size), params.group_size, size.device)
    return found[torch.argsort(torch.argsort(size, descending=True, stable=True))] if params.wide else found


def native_params_of(params: GridParams) -> tuple[cpu.NativeGridParams, torch.Tensor]:
    """The parameters as the native loops take them, and the candidate factors f32[ratios + fine] of the search."""
    rule, candidates = native_grid_params(
        params.bits,
        params.sym,
        mse=params.mse,
        signed=params.signed,
        zero_min=params.zero_min,
        scale_dtype=params.scale_dtype,
    )
    if params.wide:
        rule.top = -1  # each group's zero point says it
    return rule, candidates


def native_grid_params(
    bits: int, sym: bool, *, mse: bool, signed: bool, zero_min: int, scale_dtype: ScaleKind
) -> tuple[cpu.NativeGridParams, torch.Tensor]:
    """The arguments of `fit` as the native loops take them: (rule, candidates f32[ratios + fine])."""
    ratios, fine = _ratios(scale_dtype)
    return (
        cpu.native_grid_params(
            top_of(bits, scale_dtype),
            middle_of(bits, scale_dtype),
            sym,
            turn=signed,
            mse=mse,
            zero_min=zero_min,
            dtype=scale_dtype,
            ratios=len(ratios),
            fine=len(fine),
            refits=REFITS,
        ),
        torch.tensor([*ratios, *fine]),
    )


def _ratios(scale_dtype: ScaleKind) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Factors of the first scale that a search tries, and shares of it that are added to the best."""
    if not isinstance(scale_dtype, FloatScale):
        return RATIOS, FINE
    return (POWERS, ()) if scale_dtype.power else (FLOAT_RATIOS, FINE)


def _turn(part: torch.Tensor) -> torch.Tensor:
    """-1 for groups whose largest weight is positive, else 1, f32[r, G, 1]: it turns that weight to the longer end."""
    return torch.where(part.amax(-1, keepdim=True) > -part.amin(-1, keepdim=True), -1.0, 1.0)


def _minmax(
    part: torch.Tensor, bits: int, sym: bool, zero_min: int, dtype: ScaleKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale f32[r, G, 1] and zero f32[r, G, 1] that span part f32[r, G, g]."""
    top, half = top_of(bits, dtype), float(middle_of(bits, dtype))
    if isinstance(dtype, FloatScale):
        scale = dtype.first(part.abs().amax(-1, keepdim=True))
        return scale, torch.full_like(scale, half)
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
    dtype: ScaleKind,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least weighted squared error over shrink factors, then zero points, then a least-squares refit of the scale.

    Every candidate is rounded to the stored dtype first, so the error that is compared is the error that is kept.
    """
    top = top_of(bits, dtype)
    first, zero = start
    best = [first, zero, rounding_error(part, cost, first, zero, bits, dtype)]

    def consider(scale: torch.Tensor, zero: torch.Tensor) -> None:
        scale = store_scale(scale.clamp_max(largest(dtype)), dtype)
        error = rounding_error(part, cost, scale, zero, bits, dtype)
        better = error < best[2]
        for slot, value in enumerate((scale, zero, error)):
            best[slot] = torch.where(better, value, best[slot])

    live = part.abs().amax(-1, keepdim=True) > 0
    ratios, fine = _ratios(dtype)
    for ratio in ratios:
        consider(first * ratio, zero)
    for step in fine:
        consider(torch.where(live, best[0] + first * step, best[0]), best[1])
    if not sym:
        for step in (-1, 1):
            consider(best[0], (best[1] + step).clamp_(zero_min, top))
    for _pass in range(REFITS):
        level = nearest(part / best[0], best[1], bits, dtype).sub_(best[1])
        weighted = level if cost is None else level * cost
        norm = (weighted * level).sum(-1, keepdim=True)
        refit = (weighted * part).sum(-1, keepdim=True) / norm
        consider(torch.where((norm > 0) & (refit > 0), refit, best[0]), best[1])
    return torch.where(live, best[0], first), torch.where(live, best[1], zero)


def rounding_error(
    part: torch.Tensor,
    cost: torch.Tensor | None,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    dtype: ScaleKind,
) -> torch.Tensor:
    """Weighted squared rounding error f32[r, G, 1]."""
    off = nearest(part / scale, zero, bits, dtype).sub_(zero).mul_(scale).sub_(part).square_()
    return (off if cost is None else off.mul_(cost)).sum(-1, keepdim=True)
