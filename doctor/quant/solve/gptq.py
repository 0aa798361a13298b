"""GPTQ for one linear: round column by column, and let the columns still to come make good each rounding error.

With (H + damp) ^-1 = U^T U, rounding column j of W with error e costs (e / U_jj)^2 once the later columns have been
corrected by -e / U_jj * U[j, j+1:]. Two things follow for the grid, and both are measured (SmolLM2-135M, 4 bits, groups
of 64, tr(E H E^T) on held-out text against min-max rounding = 1): the cost of an error in column j is the pivot
1 / U_jj^2, not H_jj (0.171 against 0.188, and 0.193 for equal columns); and a signed scale takes it to 0.153. That
last gain did not show in perplexity (10.87 with, 10.86 without, 9.80 unquantized, 6144 tokens), and a negative scale is
one more thing that a reader may not expect: it stays off unless asked for.

After the loop the codes are near a minimum but not in one. A pass of `refine` moves every code to its best value given
all others (coordinate descent) and every scale to its least-squares value given the codes: natively each group's scale
right after its codes, in torch all scales of a row together after all codes. No step can raise the loss.

Act-order is the flavour with static groups: columns are rounded in order of diag(H), while groups stay neighbours whose
grid is fixed beforehand, so that serving reads g_idx = i // group_size. `scattered` is the classic desc_act, whose
groups follow the order (signed: in order 0.172, static 0.153, scattered 0.155).

A dead column (diag(H) = 0) is rounded to nearest, last under act-order, and neither gives nor takes corrections. It is
not set to zero as the first implementations do: unseen in calibration is not unused, and a padded column is zero
anyway.

Two forms give the same codes but for rounding. On a CPU with the native library: H = M M^T, and what column j owes is
sum_i<j E_i M_ij (LDLQ), so nothing is inverted and the loop adds up the loss as it goes. In torch and on CUDA: U as
above, on T[k, n], so that a column of W is one run of memory; columns go in sub-blocks of 16 whose corrections reach
the rest of a block in one product, and a block's reach the rest of the matrix in one product.

Sources: Frantar et al. 2022 (arXiv 2210.17323) alg. 1; Chee et al. 2023, QuIP (arXiv 2307.13304) for LDLQ; Behdin et
al. 2023, QuantEase (arXiv 2309.01885) for the coordinate descent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import DAMP, DAMP_MAX
from doctor.quant.solve import cpu
from doctor.quant.solve.columns import round_columns
from doctor.quant.solve.factor import factorise_with_escalation
from doctor.quant.solve.grid import (
    Grid,
    GridParams,
    ScaleKind,
    dequantize,
    group_width,
    require_finite,
    store_scale,
)
from doctor.quant.solve.grid_search import fit_owned, fit_with, native_params_of, owners
from doctor.quant.solve.hosted import solve_hosted
from doctor.quant.solve.losses import SAMPLE, SAMPLE_WEIGHTS, energies, loss_shares
from doctor.quant.solve.numerics import exact_products, live_mean, row_chunks
from doctor.quant.solve.refine import refine_codes, refit_scales
from doctor.quant.solve.rtn import require_hessian, rounded
from doctor.quant.solve.solution import Solution
from doctor.quant.solve.square import Square
from doctor.quant.solving_budget import LOOP_BYTES


def solve(
    W: torch.Tensor,
    H: torch.Tensor | Square,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    act_order: bool = True,
    scattered: bool = False,
    mse: bool = True,
    signed: bool = False,
    refine: int = 1,
    damp: float = DAMP,
    damp_max: float = DAMP_MAX,
    zero_min: int = 1,
    scale_dtype: ScaleKind = torch.float16,
    squared: bool = False,
    wide: int = 0,
) -> Solution:
    """Codes, grid and losses of W[n, k], any float dtype, under H[k, k] = 2/n X^T X, both on one device. On a CPU a
    Square keeps its factor for the next linear that reads the same input; a matrix is copied.

    mse, signed, zero_min, scale_dtype: as in grid.fit. scattered: groups follow the act-order (desc_act). refine:
    passes of coordinate descent and scale refit after the loop. squared: scales as EXL2 stores them (squared_scale.py),
    fixed before the loop and kept; wide: percent of the columns in the next width. damp, damp_max: shares of mean
    diag(H) over live columns.

    Where no factor exists up to damp_max, or no column was ever active, the result is RTN with outcome "rtn".
    Raises NotQuantizable for non-finite W or H: no damping and no order of columns helps there.
    """
    params = GridParams(bits, group_size, sym, mse, signed, zero_min, scale_dtype, squared, wide)
    width = group_width(W.shape[1], group_size)
    require_finite(W)
    require_hessian(W, H)
    hosted = isinstance(H, Square) and H.hosted
    native = cpu.native_loops() and W.device.type == "cpu"
    if not native and not hosted:
        H = H.matrix() if isinstance(H, Square) else H.to(W.device)
    mean = live_mean(H)
    order = (
        torch.argsort(H.diagonal(), descending=True, stable=True)
        if act_order
        else torch.arange(len(H), device=H.device)
    )
    fixed = (
        (act_order and not scattered) or width == len(H) or squared
    )  # grids known before the first column is rounded
    steps = _Order(order if act_order else None, order, fixed)
    with exact_products():
        if isinstance(H, Square) and H.hosted:
            solution = solve_hosted(
                W,
                H,
                params,
                order,
                moved=act_order,
                fixed=fixed,
                refine=refine,
                damp=damp,
                damp_max=damp_max,
                mean=mean,
            )
        elif native and (fixed or cpu.fits(width)):
            solution = _solve_natively(W, Square.of(H), params, steps, refine, damp, damp_max, mean)
        else:
            H = H.matrix() if isinstance(H, Square) else H
            solution = _solve_in_torch(W.to(torch.float32).contiguous(), H, params, steps, refine, damp, damp_max, mean)
    if not math.isfinite(solution.loss) and mean > 0:
        raise NotQuantizable(
            _(
                "the proxy loss of W[{rows}, {columns}] is {loss} with finite W and H: float32 overflow while "
                "accumulating the loss.",
                rows=W.shape[0],
                columns=W.shape[1],
                loss=solution.loss,
            ),
            _("Run `doctor check` for outliers, or keep this linear in 16 bits."),
        )
    return solution


def pivots_of(H: Square, damp: float, damp_max: float, act_order: bool) -> torch.Tensor | None:
    """What an error costs in each column once the later ones make good for it, f32[k]: the pivots of H in the order in
    which columns are rounded. None where it has no factor. A square keeps the factor.
    """
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    order = order if act_order else torch.arange(len(H), device=H.device)
    mean = live_mean(H)
    found = torch.empty(len(H), device=H.device)
    if cpu.native_loops() and H.device.type == "cpu":
        H.factorise(damp, damp_max, mean, order)
        if not H.factored or mean == 0:
            return None
        found[order] = H.pivots().square()
        return found
    U, _attempts = factorise_with_escalation(H.matrix()[order][:, order], damp, damp_max, mean)
    if U is None or mean == 0:
        return None
    found[order] = U.diagonal() ** -2
    return found


@dataclass(frozen=True)
class _Order:
    """In which order columns are rounded."""

    moved: torch.Tensor | None  # i64[k]; None where columns keep their order
    steps: torch.Tensor  # i64[k] either way
    fixed: bool  # groups are neighbours with grids from before the loop, whatever the order


def _solve_natively(
    W: torch.Tensor,
    H: Square,
    params: GridParams,
    order: _Order,
    refine: int,
    damp: float,
    damp_max: float,
    mean: float,
) -> Solution:
    """LDLQ form: the factor M of H = M M^T is used as it is, never inverted, and its loop adds up the loss on the
    way. Rows go through it in chunks.
    """
    k = len(H)
    attempts = H.factorise(damp, damp_max, mean, order.moved)
    if not H.factored or mean == 0:
        return rounded(W, H, params, tuple(attempts))
    extra = torch.where(H.diagonal() <= 0, mean, 0.0).add_(attempts[-1].damp * mean)
    cost = torch.empty(k)
    cost[order.steps] = H.pivots().square()
    g_idx = owners(params, H.diagonal())
    if not order.fixed and order.moved is not None:
        g_idx = g_idx[torch.argsort(order.steps)]
    eigen = attempts[-1].precision == "eigen"  # then sums of the loops are of another matrix
    codes, grids, losses = torch.empty(W.shape, dtype=torch.uint8), list[Grid](), list[torch.Tensor]()
    shared = (
        fit_owned(params, W, cost, g_idx) if params.squared else None
    )  # of all rows, which share a part of the scales
    for rows in row_chunks(W.shape, LOOP_BYTES):
        part = W[rows].to(torch.float32).contiguous()
        own = None if shared is None else shared._replace(scale=shared.scale[rows], zero=shared.zero[rows])
        found, grid, loss = _loops(part, H, params, order, refine, extra, cost, g_idx, eigen, own)
        codes[rows] = found
        grids.append(grid)
        losses.append(loss)
        del part, found
    grid = shared or Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]))
    shares = loss_shares(W, H, params, cost, torch.cat(losses), max(SAMPLE, SAMPLE_WEIGHTS // k))
    return Solution(codes, grid, g_idx, "gptq", *shares, tuple(attempts))


def _loops(
    W: torch.Tensor,
    H: Square,
    params: GridParams,
    order: _Order,
    refine: int,
    extra: torch.Tensor,
    cost: torch.Tensor,
    g_idx: torch.Tensor,
    eigen: bool,
    given: Grid | None = None,
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """(codes u8[n, k], grid, loss f64[n]) of some rows W f32[n, k]. extra f32[k]: what damping added to diag(H);
    g_idx i32[k]: the group of each column; cost f32[k]: of an error in a column. given: a grid that stays as it is.
    """
    k = len(H)
    width = group_width(k, params.group_size)
    rule, candidates = native_params_of(params)
    steps = order.steps.to(torch.int32)
    owner, added = g_idx[order.steps].contiguous(), extra[order.steps]
    if order.fixed:
        grid = fit_with(params, W, cost) if given is None else given
        loop = cpu.round_columns(W, H.lower, steps, owner, added, rule, grid, forget=H.let_go)
    else:
        pivots = H.pivots().square()
        loop = cpu.round_columns(
            W, H.lower, steps, owner, added, rule, None, pivots, width, candidates, forget=H.let_go
        )
        store_scale(loop[1].abs(), params.scale_dtype)  # names the scale that became Inf
    codes, grid, loss, excess = loop[0], Grid(loop[1], loop[2]), *loop[3:]
    del loop
    by_group = torch.argsort(g_idx, stable=True)
    inside = width if cpu.fits(width) and given is None else 0
    for _pass in range(refine):
        *found, change, excess = cpu.refine(
            W,
            H.values,
            H.diagonal(),
            by_group.to(torch.int32),
            g_idx[by_group].contiguous(),
            extra[by_group],
            rule,
            codes,
            grid,
            inside,
            H.let_go,
        )
        codes, grid, loss = found[0], Grid(found[1], found[2]), loss + change
        if not inside and given is None:
            grid = refit_scales(W, H, codes, grid, g_idx, params.scale_dtype, extra)
    if eigen or (refine and not inside and given is None):  # then the sums are of another matrix, or of older scales
        return codes, grid, energies(W - dequantize(codes, grid, g_idx), H).clamp_min(0)
    return codes, grid, (loss - excess).clamp_min(0)


def _solve_in_torch(
    W: torch.Tensor,
    H: torch.Tensor,
    params: GridParams,
    order: _Order,
    refine: int,
    damp: float,
    damp_max: float,
    mean: float,
) -> Solution:
    """The form with U of H^-1 = U^T U: what CUDA runs as kernels, and a CPU without the native library."""
    width = group_width(len(H), params.group_size)
    U, attempts = factorise_with_escalation(
        H if order.moved is None else H[order.steps][:, order.steps], damp, damp_max, mean
    )
    H = H.to(torch.float32)
    if U is None or mean == 0:
        return rounded(W, H, params, tuple(attempts))
    cost = torch.empty_like(U[0])
    cost[order.steps] = U.diagonal() ** -2
    U, cost = U.to(torch.float32), cost.to(torch.float32)
    g_idx = owners(params, H.diagonal())
    T = W[:, order.steps].T.contiguous()
    lost = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    if order.fixed:
        fitted = fit_owned(params, W, cost, g_idx)
        codes, grid = round_columns(T, U, params, g_idx[order.steps], fitted, loss=lost)
        grid = grid._replace(divisor=fitted.divisor)  # which no kernel is given
    else:
        codes, grid = round_columns(T, U, params, g_idx, None, cost[order.steps], width, lost)
        g_idx = g_idx[torch.argsort(order.steps)]
    del T, U
    codes = codes[torch.argsort(order.steps)]  # [k, n]
    extra = torch.where(H.diagonal() > 0, 0.0, mean) + attempts[-1].damp * mean
    exact = attempts[-1].precision != "eigen"  # else the sums are of another matrix
    if refine:
        codes, grid, followed = refine_codes(
            W, H + torch.diag(extra), codes, grid, g_idx, params, refine, lost, order.fixed
        )
        exact = exact and followed
    codes = codes.T.contiguous()
    E = W - dequantize(codes, grid, g_idx)
    loss = (lost - (E.square() @ extra).to(torch.float64)).clamp_min(0) if exact else energies(E, H)
    return Solution(
        codes,
        grid,
        g_idx,
        "gptq",
        *loss_shares(W, H, params, cost, loss, max(SAMPLE, SAMPLE_WEIGHTS // len(H))),
        tuple(attempts),
    )
