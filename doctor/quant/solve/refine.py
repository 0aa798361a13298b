"""Refinement after GPTQ's loop: coordinate descent on the codes, and least-squares scales for the codes found.

A pass moves every code to its best value given all others, and every scale to its least-squares value given the
codes. No step can raise the loss. Source: Behdin et al. 2023, QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

import torch

from doctor.core.recipe import DAMP
from doctor.quant.solve import cpu, cuda
from doctor.quant.solve.columns import BLOCK, SUB
from doctor.quant.solve.grid import (
    Grid,
    GridParams,
    ScaleKind,
    contiguous_groups,
    group_width,
    largest,
    nearest,
    store_scale,
)
from doctor.quant.solve.grid_search import native_params_of
from doctor.quant.solve.numerics import live_mean
from doctor.quant.solve.square import Square

_REFIT_BYTES = 1 << 27  # of the G x G systems and the weights of a chunk of rows


def refine_codes(
    W: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    params: GridParams,
    passes: int,
    lost: torch.Tensor,
    neighbours: bool,
) -> tuple[torch.Tensor, Grid, bool]:
    """(codes u8[k, n], grid, whether `lost` f64[n] is still the loss under the damped H). neighbours: groups are runs
    of columns.
    """
    if params.floats or params.squared or not (W.is_cuda and cuda.available(W.device) is None):
        codes = codes.T.contiguous()
        for _ in range(passes):
            codes = descend(W, H, codes, grid, g_idx, params)
            grid = grid if params.squared else refit_scales(W, H, codes, grid, g_idx, params.scale_dtype)
        return codes.T, grid, False
    by_group = None if neighbours else torch.argsort(g_idx, stable=True)
    W, ordered, damped = W.T, g_idx, H
    if by_group is not None:
        W, ordered, codes, damped = W[by_group], g_idx[by_group], codes[by_group], H[by_group][:, by_group]
    width = len(H) // grid.scale.shape[1]
    inside = width if cuda.fits(width) else 0
    codes = codes.contiguous()
    for _ in range(passes):
        index = ordered.to(torch.int64)
        E = W - (codes.to(torch.float32) - grid.zero.T[index]) * grid.scale.T[index]
        codes, grid = cuda.refine(E.contiguous(), damped, codes, grid, ordered, params, inside, lost)
        if not inside:
            found = codes.T if by_group is None else codes.T[:, torch.argsort(by_group)]
            grid = refit_scales(
                W.T if by_group is None else W.T[:, torch.argsort(by_group)],
                H,
                found.contiguous(),
                grid,
                g_idx,
                params.scale_dtype,
            )
    return codes if by_group is None else codes[torch.argsort(by_group)], grid, bool(inside)


def improve(
    W: torch.Tensor,
    H: torch.Tensor | Square,
    codes: torch.Tensor,
    grid: Grid,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
    damp: float = DAMP,
    scale_dtype: ScaleKind = torch.float16,
) -> tuple[torch.Tensor, Grid]:
    """One pass of refinement of codes u8[n, k] on a grid of neighbours, wherever they come from, under H f32[k, k] with
    damp.
    """
    params = GridParams(bits, group_size, sym, True, False, zero_min, scale_dtype)
    mean, width = live_mean(H), group_width(W.shape[1], group_size)
    if mean == 0:
        return codes, grid
    g_idx = contiguous_groups(W.shape[1], group_size, W.device)
    extra = torch.where(H.diagonal() > 0, 0.0, mean) + damp * mean
    if not cpu.usable(W):
        lost = torch.zeros(len(W), dtype=torch.float64, device=W.device)
        full = H.matrix() if isinstance(H, Square) else H
        codes, grid, _ = refine_codes(
            W, full + torch.diag(extra), codes.T.contiguous(), grid, g_idx, params, 1, lost, True
        )
        return codes.T.contiguous(), grid
    inside = width if cpu.fits(width) else 0
    codes, scale, zero, *_ = cpu.refine(
        W.contiguous(),
        H.values if isinstance(H, Square) else H.contiguous(),
        H.diagonal(),
        torch.arange(len(H), dtype=torch.int32),
        g_idx,
        extra,
        native_params_of(params)[0],
        codes,
        grid,
        inside,
    )
    grid = Grid(scale, zero)
    return codes, grid if inside else refit_scales(W, H, codes, grid, g_idx, extra=extra)


def descend(
    W: torch.Tensor, H: torch.Tensor, codes: torch.Tensor, grid: Grid, g_idx: torch.Tensor, params: GridParams
) -> torch.Tensor:
    """One pass of coordinate descent: each code u8[n, k] in turn to its best value given all others, under H."""
    index = g_idx.to(torch.int64)
    scale, zero = grid.scale.T[index], grid.zero.T[index].to(torch.float32)  # [k, n]
    T, chosen = W.T.contiguous(), codes.T.to(torch.float32)
    error = T - (chosen - zero) * scale
    pull = H @ error  # half the gradient, [k, n]
    for begin in range(0, len(H), BLOCK):
        end = min(len(H), begin + BLOCK)
        own = slice(begin, end)
        before = error[own].clone()
        descend_block(T[own], H[own, own], chosen[own], error[own], pull[own], scale[own], zero[own], params)
        if end < len(H):
            pull[end:].addmm_(H[end:, own], error[own] - before)
    return chosen.T.to(torch.uint8).contiguous()


def descend_block(
    T: torch.Tensor,
    H: torch.Tensor,
    chosen: torch.Tensor,
    error: torch.Tensor,
    pull: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    params: GridParams,
) -> None:
    """The columns of a block, in turn: all f32[b, n], H f32[b, b] of the block alone. chosen (codes), error (T less
    what the codes stand for) and pull (half the gradient) change in place.
    """
    live = (H.diagonal() > 0).tolist()  # asked once: a device is waited for
    for first in range(0, len(H), SUB):
        last = min(len(H), first + SUB)
        before = error[first:last].clone()
        for j in range(first, last):
            best = pull[j] / H[j, j] + T[j] - error[j] if live[j] else T[j]
            chosen[j] = nearest(best / scale[j], zero[j], params.code_bits, params.scale_dtype)
            moved = T[j] - (chosen[j] - zero[j]) * scale[j] - error[j]
            error[j] += moved
            pull[first:last].addr_(H[first:last, j], moved)
        if last < len(H):
            pull[last:].addmm_(H[last:, first:last], error[first:last] - before)


def refit_scales(
    W: torch.Tensor,
    H: torch.Tensor | Square,
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    dtype: ScaleKind = torch.float16,
    extra: torch.Tensor | None = None,
) -> Grid:
    """The grid whose scales minimise tr(E H E^T) given codes u8[n, k]: G unknowns a row, solved together. extra f32[k]:
    what damping adds to diag(H), None for nothing. A Square takes groups of neighbours only.

    Scales are rounded to dtype, and a row keeps its old ones where rounding leaves nothing gained, or where the best
    value of one changes sign or vanishes (a group of zeros has no best scale).
    """
    n, groups = grid.scale.shape
    by_group = torch.argsort(g_idx, stable=True)
    width = len(by_group) // groups
    damped = _Damped(
        H if isinstance(H, Square) else H[by_group][:, by_group], None if extra is None else extra[by_group]
    )
    scale = grid.scale.clone()
    rows = max(1, _REFIT_BYTES // (8 * (groups * groups + len(by_group))))
    for first in range(0, n, rows):
        part = slice(first, min(n, first + rows))
        level = (codes[part].to(torch.float32) - grid.zero[part][:, g_idx.to(torch.int64)])[:, by_group]
        count = level.shape[0]
        target = (damped.product(W[part][:, by_group]) * level).reshape(count, groups, width).sum(-1).to(torch.float64)
        A = torch.empty(count, groups, groups, dtype=torch.float64, device=W.device)
        for g in range(groups):  # A[g, h] = q_g H_gh q_h^T, symmetric
            begin, end = g * width, (g + 1) * width
            reach = (level[:, begin:end] @ damped.strip(begin, end)).mul_(level[:, begin:])
            A[:, g, g:] = A[:, g:, g] = reach.reshape(count, groups - g, width).sum(-1).to(torch.float64)
        old = grid.scale[part]
        empty = A.diagonal(dim1=1, dim2=2) <= 0
        A.diagonal(dim1=1, dim2=2)[empty] = 1
        best, info = torch.linalg.solve_ex(A, target)
        best = best.to(torch.float32)
        usable = (info == 0)[:, None] & torch.isfinite(best) & (best.sign() == old.sign()) & ~empty
        size = torch.where(usable, best, old).abs().clamp_max(largest(dtype))
        new = store_scale(size, dtype) * old.sign()

        gained = _scale_cost(A, target, new) < _scale_cost(A, target, old)
        scale[part] = torch.where(gained[:, None], new, old)
    return Grid(scale, grid.zero)


class _Damped:
    """H + diag(extra), of which rows are made when they are asked for."""

    def __init__(self, H: torch.Tensor | Square, extra: torch.Tensor | None):
        self._H, self._extra = H, extra

    def product(self, E: torch.Tensor) -> torch.Tensor:
        found = self._H.product(E) if isinstance(self._H, Square) else E @ self._H
        return found if self._extra is None else found.addcmul_(E, self._extra)

    def strip(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) from column `begin` on."""
        square = isinstance(self._H, Square)
        found = self._H.strip(begin, end) if square else self._H[begin:end, begin:].clone()  # type: ignore[union-attr,index]
        if self._extra is not None:
            found.diagonal().add_(self._extra[begin:end])
        return found


def _scale_cost(A: torch.Tensor, target: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) of each row less a constant, f64[rows], for scales [rows, G] under A f64[rows, G, G] and target
    f64[rows, G].
    """
    s = scale.to(torch.float64)
    return ((A @ s[:, :, None])[:, :, 0] * s).sum(1) - 2 * (target * s).sum(1)
