"""GPTQ on a device whose memory does not hold the Hessian: the square lies in the host's memory, rows of it come over.

The loop is the one of columns.py, a block of columns at a time. With H = M M^T, M upper triangular in the order of
rounding, and E the errors of the columns before a block B, the errors of the block cost |e_B M_BB + E M_:B|^2. So the
block is rounded as one of its own, under U = M_BB^-1, from weights that are moved by E M_:B U: the same codes as
carrying each error on to all later columns, and only the columns of M that belong to B are needed at a time.

Refinement goes through blocks of columns of H in the same way. Rows of W are worked on some at a time, so what the
device holds is W as it is stored, the codes, and LOOP_BYTES a few times over.

Source: Frantar et al. 2022 (arXiv 2210.17323) for the loop; Chee et al. 2023 (arXiv 2307.13304) for the form with M.
"""

from __future__ import annotations

import torch

from doctor.formats.grid import Grid, dequantize, group_width
from doctor.quant.solve.columns import BLOCK, round_columns
from doctor.quant.solve.grid import GridParams, largest, store_scale
from doctor.quant.solve.grid_search import fit_owned, fit_with, owners
from doctor.quant.solve.losses import SAMPLE, SAMPLE_WEIGHTS, energies, loss_shares
from doctor.quant.solve.numerics import row_chunks
from doctor.quant.solve.refine import descend_block, refit_scales
from doctor.quant.solve.rtn import rounded
from doctor.quant.solve.solution import Solution
from doctor.quant.solve.square import Square
from doctor.quant.solving_budget import LOOP_BYTES


def solve_hosted(
    W: torch.Tensor,
    H: Square,
    params: GridParams,
    steps: torch.Tensor,
    *,
    moved: bool,
    fixed: bool,
    refine: int,
    damp: float,
    damp_max: float,
    mean: float,
) -> Solution:
    """Codes, grid and losses of W[n, k] on the device that H computes on. steps i64[k]: the order of rounding; moved:
    it is not the columns' own. fixed: groups are neighbours with grids from before the loop.
    """
    k = len(H)
    attempts = tuple(H.factorise(damp, damp_max, mean, steps if moved else None))
    if not H.factored or mean == 0:
        return rounded(W, H, params, attempts)
    cost = torch.empty(k, device=W.device)
    cost[steps] = H.pivots().square()
    extra = torch.where(H.diagonal() <= 0, mean, 0.0) + attempts[-1].damp * mean
    g_idx = owners(params, H.diagonal())
    if not fixed:
        g_idx = g_idx[torch.argsort(steps)]
    shared = fit_owned(params, W.to(torch.float32), cost, g_idx) if params.squared else None
    codes, grids = torch.empty(W.shape, dtype=torch.uint8, device=W.device), list[Grid]()
    loss = torch.empty(len(W), dtype=torch.float64, device=W.device)
    for rows in row_chunks(W.shape, LOOP_BYTES):
        part = W[rows].to(torch.float32)
        own = None
        if fixed:
            own = fit_with(params, part, cost) if shared is None else Grid(shared.scale[rows], shared.zero[rows])
        found, grid = _round(part, H, params, steps, g_idx, own, cost)
        for _pass in range(refine):
            found, grid = _descend(part, H, extra, found, grid, g_idx, params)
        codes[rows] = found
        grids.append(grid)
        loss[rows] = energies(part - dequantize(found, grid, g_idx), H).clamp_min(0)
    grid = shared or Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]))
    shares = loss_shares(W, H, params, cost, loss, max(SAMPLE, SAMPLE_WEIGHTS // k))
    return Solution(codes, grid, g_idx, "gptq", *shares, attempts)


def _round(
    W: torch.Tensor,
    H: Square,
    params: GridParams,
    steps: torch.Tensor,
    g_idx: torch.Tensor,
    fixed: Grid | None,
    cost: torch.Tensor,
) -> tuple[torch.Tensor, Grid]:
    """(codes u8[n, k], grid) of rows W f32[n, k]. fixed: their grid; None: each group's is fitted when it comes up."""
    k = W.shape[1]
    width = group_width(k, params.group_size)
    block = BLOCK if fixed is not None else max(width, width * (BLOCK // width))
    owner, back = g_idx[steps], torch.argsort(steps)
    T = W[:, steps].T.contiguous()
    E, codes, grids = torch.zeros_like(T), torch.empty(T.shape, dtype=torch.uint8, device=T.device), list[Grid]()
    for begin in range(0, k, block):
        end = min(k, begin + block)
        M = H.factor_panel(begin, end)
        own = slice(begin, end)
        U = torch.linalg.solve_triangular(M[own], torch.eye(end - begin, device=T.device), upper=True)
        moved = T[own].addmm(U.T, M[:begin].T @ E[:begin]) if begin else T[own].clone()
        groups = owner[own]
        if fixed is not None:
            codes[own], grid = round_columns(moved, U, params, groups, fixed)
        else:
            first = int(groups[0])
            codes[own], grid = round_columns(moved, U, params, groups - first, None, cost[steps[own]], width)
            grids.append(grid)
            groups = groups - first
        index = groups.to(torch.int64)
        E[own] = T[own] - (codes[own].to(torch.float32) - grid.zero.T[index]) * grid.scale.T[index]
    if fixed is None:
        fixed = Grid(torch.cat([g.scale for g in grids], 1), torch.cat([g.zero for g in grids], 1))
    return codes[back].T.contiguous(), fixed


def _descend(
    W: torch.Tensor,
    H: Square,
    extra: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    params: GridParams,
) -> tuple[torch.Tensor, Grid]:
    """One pass of coordinate descent of codes u8[n, k] under H + diag(extra f32[k]), as `refine.descend`, a group after
    the other; the scale of a group is fitted again after its codes, the grid of a whole row after all of them.
    """
    k, index = len(H), g_idx.to(torch.int64)
    width = group_width(k, params.group_size)
    block = BLOCK if width == k else width
    T, chosen, scales = W.T.contiguous(), codes.T.to(torch.float32), grid.scale.clone()
    error = T - (chosen - grid.zero.T[index]) * grid.scale.T[index]
    for own in torch.argsort(g_idx, stable=True).split(block):
        columns = H.columns_of(own)
        inside = columns[own] + torch.diag(extra[own])
        e, c = error[own], chosen[own]
        pull = columns.T @ error + extra[own, None] * e
        group = index[own]
        scale, zero = scales.T[group], grid.zero.T[group].to(torch.float32)
        after = e.clone()
        descend_block(T[own], inside, c, after, pull.clone(), scale, zero, params)
        if width < k and not params.squared:
            pull.addmm_(inside, after - e)
            g, level = int(group[0]), c - zero
            scales[:, g] = _fitted(scales[:, g], level, pull, inside, params)
            after = T[own] - level * scales[:, g]
        error[own], chosen[own] = after, c
    codes, grid = chosen.T.to(torch.uint8).contiguous(), Grid(scales, grid.zero)
    if width == k and not params.squared:
        grid = refit_scales(W, H, codes, grid, g_idx, params.scale_dtype, extra)
    return codes, grid


def _fitted(
    scale: torch.Tensor, level: torch.Tensor, pull: torch.Tensor, H: torch.Tensor, params: GridParams
) -> torch.Tensor:
    """The scale f32[n] of a group that lowers the loss, given levels f32[w, n], half the gradient pull f32[w, n] and H
    f32[w, w] of the group; the old one where rounding leaves nothing gained, or the best one changes sign.
    """
    curve, slope = (level * (H @ level)).sum(0), (level * pull).sum(0)
    best = scale + slope / curve
    usable = (curve > 0) & torch.isfinite(best) & (best.sign() == scale.sign())
    size = torch.where(usable, best, scale).abs().clamp_max(largest(params.scale_dtype))
    new = store_scale(size, params.scale_dtype) * scale.sign()
    step = new - scale
    return torch.where(step * (step * curve - 2 * slope) < 0, new, scale)
