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
from functools import partial

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.recipe import DAMP, DAMP_MAX
from doctor.quant.solve import cpu, kernels
from doctor.quant.solve.grid import (
    Grid,
    contiguous_groups,
    dequantize,
    fit,
    group_width,
    native_rule,
    quantize,
    require_finite,
    store_scale,
)
from doctor.quant.solve.hessian import (
    Attempt,
    all_finite,
    exact_products,
    factorise_with_escalation,
    live_mean,
    reversed_factor,
)

_BLOCK = 128
_SUB = 16
# Rows of W whose losses are taken exactly: where H is wide, 128 come no closer than 64 (SmolLM2-135M, plain inputs and
# one dominant direction); where it is narrow, more cost nothing.
_SAMPLE, _SAMPLE_WEIGHTS = 64, 1 << 17
_CLEAR = 0.8
_POWER_STEPS = 3  # from the largest column; more bring nothing where one direction dominates
_ROWS_AT_A_TIME = 128  # so that what is made of them stays in the cache
_REFIT_BYTES = 1 << 27  # of the G x G systems and the weights of a chunk of rows


@dataclass(frozen=True)
class Solution:
    """One quantized linear. Losses are tr(E H E^T) / tr(W H W^T), E = W - Q, H undamped; NaN where nothing was active.

    Past some rows they are told from a sample (see _shares).
    """

    codes: torch.Tensor  # u8[n, k], columns in their original order
    grid: Grid  # scale f32[n, G], zero i32[n, G]
    g_idx: torch.Tensor  # i32[k], the group of each column
    outcome: str  # gptq; rtn where no factor was found, or asked for
    loss: float
    rtn_loss: float  # rounding to nearest on a grid of the same kind
    attempts: tuple[Attempt, ...]  # every try to factor H, the last one used; empty for rtn by choice

    def weight(self) -> torch.Tensor:
        """f32[n, k]: what a reader of the codes computes."""
        return dequantize(self.codes, self.grid, self.g_idx)


@dataclass(frozen=True)
class _Rules:
    """How grids are fitted: the arguments of grid.fit that do not depend on the group."""

    bits: int
    group_size: int
    sym: bool
    mse: bool
    signed: bool
    zero_min: int
    scale_dtype: torch.dtype

    def fit(self, W: torch.Tensor, weight: torch.Tensor | None, group_size: int | None = None) -> Grid:
        return fit(
            W,
            self.bits,
            self.group_size if group_size is None else group_size,
            self.sym,
            mse=self.mse,
            weight=weight,
            signed=self.signed,
            zero_min=self.zero_min,
            scale_dtype=self.scale_dtype,
        )

    @property
    def native(self) -> tuple[cpu.Rule, torch.Tensor]:
        return native_rule(
            self.bits, self.sym, mse=self.mse, signed=self.signed, zero_min=self.zero_min, scale_dtype=self.scale_dtype
        )


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
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
    scale_dtype: torch.dtype = torch.float16,
) -> Solution:
    """Codes, grid and losses of W[n, k] under H[k, k] = 2/n X^T X, both on one device.

    mse, signed, zero_min, scale_dtype: as in grid.fit. scattered: groups follow the act-order (desc_act). refine:
    passes of coordinate descent and scale refit after the loop. damp, damp_max: shares of mean diag(H) over live
    columns.

    Where no factor exists up to damp_max, or no column was ever active, the result is RTN with outcome "rtn".
    Raises NotQuantizable for non-finite W or H: no damping and no order of columns helps there.
    """
    rules = _Rules(bits, group_size, sym, mse, signed, zero_min, scale_dtype)
    width = group_width(W.shape[1], group_size)
    require_finite(W)
    _require_hessian(W, H)
    W, H = W.to(torch.float32).contiguous(), H.to(W.device)
    mean = live_mean(H)
    order = (
        torch.argsort(H.diagonal(), descending=True, stable=True)
        if act_order
        else torch.arange(len(H), device=H.device)
    )
    fixed = (act_order and not scattered) or width == len(H)  # grids known before the first column is rounded
    method = _solve_natively if cpu.usable(W) and (fixed or cpu.fits(width)) else _solve_in_torch
    with exact_products():
        solution = method(W, H, rules, _Order(order if act_order else None, order, fixed), refine, damp, damp_max, mean)
    if not math.isfinite(solution.loss) and mean > 0:
        raise NotQuantizable(
            f"the proxy loss of W[{W.shape[0]}, {W.shape[1]}] is {solution.loss} with finite W and H: a sum ran "
            "over in float32.",
            "Run `doctor check` for outliers, or keep this linear in 16 bits.",
        )
    return solution


@dataclass(frozen=True)
class _Order:
    """In which order columns are rounded."""

    moved: torch.Tensor | None  # i64[k]; None where it is the order they stand in
    steps: torch.Tensor  # i64[k] either way
    fixed: bool  # groups are neighbours with grids from before the loop, whatever the order


def _solve_natively(
    W: torch.Tensor,
    H: torch.Tensor,
    rules: _Rules,
    order: _Order,
    refine: int,
    damp: float,
    damp_max: float,
    mean: float,
) -> Solution:
    """LDLQ form: the factor M of H = M M^T is used as it is, never inverted, and its loop adds up the loss on the
    way.
    """
    k = len(H)
    width = group_width(k, rules.group_size)
    L, attempts = factorise_with_escalation(H, damp, damp_max, mean, partial(reversed_factor, order=order.moved))
    H = H.to(torch.float32)
    if L is None or mean == 0:
        return _rounded(W, H, rules, tuple(attempts))
    dead = H.diagonal() <= 0
    extra = torch.where(dead, mean, 0.0).add_(attempts[-1].damp * mean)
    pivots = L.diagonal().flip(0).square()
    cost = torch.empty(k)
    cost[order.steps] = pivots
    g_idx = contiguous_groups(k, rules.group_size)
    steps = order.steps.to(torch.int32)
    if order.fixed:
        loop = cpu.round_columns(
            W, L, steps, g_idx[order.steps].contiguous(), extra[order.steps], rules.native[0], rules.fit(W, cost)
        )
    else:
        loop = cpu.round_columns(
            W, L, steps, g_idx, extra[order.steps], rules.native[0], None, pivots, width, rules.native[1]
        )
        store_scale(loop[1].abs(), rules.scale_dtype)  # names the scale that became Inf
        if order.moved is not None:
            g_idx = g_idx[torch.argsort(order.steps)]
    codes, grid, loss, excess = loop[0], Grid(*loop[1:3]), *loop[3:]
    del L, loop
    by_group = torch.argsort(g_idx, stable=True)
    inside = width if cpu.fits(width) else 0
    for _ in range(refine):
        *found, change, excess = cpu.refine(
            W,
            H,
            by_group.to(torch.int32),
            g_idx[by_group].contiguous(),
            extra[by_group],
            rules.native[0],
            codes,
            grid,
            inside,
        )
        codes, grid, loss = found[0], Grid(*found[1:]), loss + change
        if not inside:
            grid = refit_scales(W, H + torch.diag(extra), codes, grid, g_idx, rules.scale_dtype)
    if attempts[-1].precision == "eigen" or (
        refine and not inside
    ):  # then the sums are of another matrix, or of older scales
        loss, excess = _energies(W - dequantize(codes, grid, g_idx), H), 0
    return Solution(
        codes,
        grid,
        g_idx,
        "gptq",
        *_shares(W, H, rules, cost, (loss - excess).clamp_min(0), max(_SAMPLE, _SAMPLE_WEIGHTS // k)),
        tuple(attempts),
    )


def _shares(
    W: torch.Tensor, H: torch.Tensor, rules: _Rules, cost: torch.Tensor, loss: torch.Tensor, most: int
) -> tuple[float, float]:
    """(loss, rtn_loss) as shares of tr(W H W^T), from the loss f64[n] of each row.

    Up to `most` rows exact. Above, what else is needed is taken from that many rows at equal distances, and scaled to
    all: the energy of W by what _likely_energies gives for every row (within 1 to 2 %), and the loss of RTN by ours on
    the same rows (within 10 %, measured with one dominant direction). Where the two losses come closer than _CLEAR, all
    rows are taken after all: which is the less is never a guess. A product with H for all rows would cost as much as
    the loop does.
    """
    n = len(W)
    rows = torch.arange(min(n, most), device=W.device)
    rows = rows if n <= most else rows * n // most
    part = W[rows]
    grid = rules.fit(part, cost)
    E = part - dequantize(quantize(part, grid, rules.bits), grid)
    whole, rounded = _energies(torch.cat([part, E]), H).view(2, -1).sum(1)
    ours = loss[rows].sum()
    if n > most:
        if not ours < _CLEAR * rounded:
            return _shares(W, H, rules, cost, loss, n)
        own = _likely_energies(W, H)
        scaled = own.sum() / own[rows].sum() if own[rows].sum() > 0 else 1.0
        whole, rounded = whole * scaled, rounded * (loss.sum() / ours if ours > 0 else scaled)
    return _share(loss.sum(), whole), _share(rounded, whole)


def _likely_energies(W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """About w H w^T of each row, f64[n]: H as its strongest direction, where one may hold most of the energy, and a
    diagonal.
    """
    v = H[:, int(H.diagonal().argmax())]
    for _ in range(_POWER_STEPS):
        v = H @ (v / v.norm())
    strength = v.norm()
    v = v / strength
    rest = (H.diagonal() - strength * v.square()).clamp_min(0)
    return torch.cat([strength * (some @ v).square() + some.square() @ rest for some in W.split(_ROWS_AT_A_TIME)]).to(
        torch.float64
    )


def _solve_in_torch(
    W: torch.Tensor,
    H: torch.Tensor,
    rules: _Rules,
    order: _Order,
    refine: int,
    damp: float,
    damp_max: float,
    mean: float,
) -> Solution:
    """The form with U of H^-1 = U^T U: what CUDA runs as kernels, and a CPU without the native library."""
    width = group_width(len(H), rules.group_size)
    U, attempts = factorise_with_escalation(
        H if order.moved is None else H[order.steps][:, order.steps], damp, damp_max, mean
    )
    H = H.to(torch.float32)
    if U is None or mean == 0:
        return _rounded(W, H, rules, tuple(attempts))
    cost = torch.empty_like(U[0])
    cost[order.steps] = U.diagonal() ** -2
    U, cost = U.to(torch.float32), cost.to(torch.float32)
    g_idx = contiguous_groups(len(H), rules.group_size, W.device)
    T = W[:, order.steps].T.contiguous()
    lost = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    if order.fixed:
        codes, grid = _round_columns(T, U, rules, g_idx[order.steps], rules.fit(W, cost), loss=lost)
    else:
        codes, grid = _round_columns(T, U, rules, g_idx, None, cost[order.steps], width, lost)
        g_idx = g_idx[torch.argsort(order.steps)]
    del T, U
    codes = codes[torch.argsort(order.steps)]  # [k, n]
    extra = torch.where(H.diagonal() > 0, 0.0, mean) + attempts[-1].damp * mean
    exact = attempts[-1].precision != "eigen"  # else the sums are of another matrix
    if refine:
        codes, grid, followed = _refine(W, H + torch.diag(extra), codes, grid, g_idx, rules, refine, lost, order.fixed)
        exact = exact and followed
    codes = codes.T.contiguous()
    E = W - dequantize(codes, grid, g_idx)
    loss = (lost - (E.square() @ extra).to(torch.float64)).clamp_min(0) if exact else _energies(E, H)
    return Solution(
        codes,
        grid,
        g_idx,
        "gptq",
        *_shares(W, H, rules, cost, loss, max(_SAMPLE, _SAMPLE_WEIGHTS // len(H))),
        tuple(attempts),
    )


def _refine(
    W: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    rules: _Rules,
    passes: int,
    lost: torch.Tensor,
    neighbours: bool,
) -> tuple[torch.Tensor, Grid, bool]:
    """(codes u8[k, n], grid, whether `lost` f64[n] is still the loss under the damped H). neighbours: groups are runs
    of columns.
    """
    if not (W.is_cuda and kernels.available(W.device) is None):
        codes = codes.T.contiguous()
        for _ in range(passes):
            codes = descend(W, H, codes, grid, g_idx, rules.bits)
            grid = refit_scales(W, H, codes, grid, g_idx, rules.scale_dtype)
        return codes.T, grid, False
    by_group = None if neighbours else torch.argsort(g_idx, stable=True)
    W, ordered, damped = W.T, g_idx, H
    if by_group is not None:
        W, ordered, codes, damped = W[by_group], g_idx[by_group], codes[by_group], H[by_group][:, by_group]
    width = len(H) // grid.scale.shape[1]
    inside = width if kernels.fits(width) else 0
    codes = codes.contiguous()
    for _ in range(passes):
        index = ordered.to(torch.int64)
        E = W - (codes.to(torch.float32) - grid.zero.T[index]) * grid.scale.T[index]
        codes, grid = kernels.refine(E.contiguous(), damped, codes, grid, ordered, rules, inside, lost)
        if not inside:
            found = codes.T if by_group is None else codes.T[:, torch.argsort(by_group)]
            grid = refit_scales(
                W.T if by_group is None else W.T[:, torch.argsort(by_group)],
                H,
                found.contiguous(),
                grid,
                g_idx,
                rules.scale_dtype,
            )
    return codes if by_group is None else codes[torch.argsort(by_group)], grid, bool(inside)


def improve(
    W: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
    damp: float = DAMP,
) -> tuple[torch.Tensor, Grid]:
    """One pass of refinement of codes u8[n, k] on a grid of neighbours, wherever they come from, under H f32[k, k] with
    damp.
    """
    rules = _Rules(bits, group_size, sym, True, False, zero_min, torch.float16)
    mean, width = live_mean(H), group_width(W.shape[1], group_size)
    if mean == 0:
        return codes, grid
    g_idx = contiguous_groups(W.shape[1], group_size, W.device)
    extra = torch.where(H.diagonal() > 0, 0.0, mean) + damp * mean
    if not cpu.usable(W):
        lost = torch.zeros(len(W), dtype=torch.float64, device=W.device)
        codes, grid, _ = _refine(W, H + torch.diag(extra), codes.T.contiguous(), grid, g_idx, rules, 1, lost, True)
        return codes.T.contiguous(), grid
    inside = width if cpu.fits(width) else 0
    codes, scale, zero, *_ = cpu.refine(
        W.contiguous(),
        H.contiguous(),
        torch.arange(len(H), dtype=torch.int32),
        g_idx,
        extra,
        rules.native[0],
        codes,
        grid,
        inside,
    )
    grid = Grid(scale, zero)
    return codes, grid if inside else refit_scales(W, H + torch.diag(extra), codes, grid, g_idx)


def round_to_nearest(
    W: torch.Tensor,
    H: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    mse: bool = True,
    signed: bool = False,
    zero_min: int = 1,
    scale_dtype: torch.dtype = torch.float16,
) -> Solution:
    """RTN of W[n, k]. With H, mse weighs columns by its diagonal and the losses are known; without, they are NaN."""
    require_finite(W)
    if H is not None:
        _require_hessian(W, H)
        H = H.to(W.device, torch.float32)
    return _rounded(W.to(torch.float32), H, _Rules(bits, group_size, sym, mse, signed, zero_min, scale_dtype), ())


def proxy_loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q: the share of the output's energy that quantizing changes."""
    E = W - Q
    return float(_energy(E, H) / _energy(W, H))


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """part / whole; 0 where both are 0, as for a weight of zeros, which every grid holds exactly."""
    return 0.0 if part == 0 else float(part / whole)


def _energy(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T), summed over rows in float64."""
    return _energies(E, H).sum()


def _energies(E: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """e H e^T of each row, f64[n]."""
    return ((E @ H) * E).sum(1).to(torch.float64)


def descend(
    W: torch.Tensor, H: torch.Tensor, codes: torch.Tensor, grid: Grid, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """One pass of coordinate descent: each code u8[n, k] in turn to its best value given all others, under H."""
    top = 2**bits - 1
    index = g_idx.to(torch.int64)
    scale, zero = grid.scale.T[index], grid.zero.T[index].to(torch.float32)  # [k, n]
    T, chosen = W.T.contiguous(), codes.T.to(torch.float32)
    error = T - (chosen - zero) * scale
    pull = H @ error  # half the gradient, [k, n]
    for begin in range(0, len(H), _BLOCK):
        end = min(len(H), begin + _BLOCK)
        before = error[begin:end].clone()
        for first in range(begin, end, _SUB):
            last = min(end, first + _SUB)
            for j in range(first, last):
                best = pull[j] / H[j, j] + T[j] - error[j] if H[j, j] > 0 else T[j]
                chosen[j] = (best / scale[j]).round_().add_(zero[j]).clamp_(0, top)
                moved = T[j] - (chosen[j] - zero[j]) * scale[j] - error[j]
                error[j] += moved
                pull[first:last].addr_(H[first:last, j], moved)
            if last < end:
                pull[last:end].addmm_(H[last:end, first:last], error[first:last] - before[first - begin : last - begin])
        if end < len(H):
            pull[end:].addmm_(H[end:, begin:end], error[begin:end] - before)
    return chosen.T.to(torch.uint8).contiguous()


def refit_scales(
    W: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    dtype: torch.dtype = torch.float16,
) -> Grid:
    """The grid whose scales minimise tr(E H E^T) given codes u8[n, k]: G unknowns a row, solved together.

    Scales are rounded to dtype, and a row keeps its old ones where rounding leaves nothing gained, or where the best
    value of one changes sign or vanishes (a group of zeros has no best scale).
    """
    n, groups = grid.scale.shape
    by_group = torch.argsort(g_idx, stable=True)
    width = len(by_group) // groups
    H = H[by_group][:, by_group]
    scale = grid.scale.clone()
    rows = max(1, _REFIT_BYTES // (8 * (groups * groups + len(H))))
    for first in range(0, n, rows):
        part = slice(first, min(n, first + rows))
        level = (codes[part].to(torch.float32) - grid.zero[part][:, g_idx.to(torch.int64)])[:, by_group]
        count = level.shape[0]
        target = ((W[part][:, by_group] @ H) * level).reshape(count, groups, width).sum(-1).to(torch.float64)
        A = torch.empty(count, groups, groups, dtype=torch.float64, device=W.device)
        for g in range(groups):  # A[g, h] = q_g H_gh q_h^T, symmetric
            begin, end = g * width, (g + 1) * width
            reach = (level[:, begin:end] @ H[begin:end, begin:]).mul_(level[:, begin:])
            A[:, g, g:] = A[:, g:, g] = reach.reshape(count, groups - g, width).sum(-1).to(torch.float64)
        old = grid.scale[part]
        empty = A.diagonal(dim1=1, dim2=2) <= 0
        A.diagonal(dim1=1, dim2=2)[empty] = 1
        best, info = torch.linalg.solve_ex(A, target)
        best = best.to(torch.float32)
        usable = (info == 0)[:, None] & torch.isfinite(best) & (best.sign() == old.sign()) & ~empty
        size = torch.where(usable, best, old).abs().clamp_max(torch.finfo(dtype).max)
        new = store_scale(size, dtype) * old.sign()

        def cost(s: torch.Tensor) -> torch.Tensor:
            s = s.to(torch.float64)
            return ((A @ s[:, :, None])[:, :, 0] * s).sum(1) - 2 * (target * s).sum(1)

        scale[part] = torch.where((cost(new) < cost(old))[:, None], new, old)
    return Grid(scale, grid.zero)


def _round_columns(
    T: torch.Tensor,
    U: torch.Tensor,
    rules: _Rules,
    groups: torch.Tensor,
    static: Grid | None,
    cost: torch.Tensor | None = None,
    width: int = 0,
    loss: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Grid]:
    """codes u8[k, n] of T f32[k, n] (destroyed), whose rows are columns of W in the order of rounding, and the grid.

    groups i32[k]: the group of each row of T. static None: the grid of a group is fitted when its first row comes up,
    on weights that carry every correction so far; then groups must be runs of `width`, and cost f32[k] is in order.
    e H e^T of the damped H, the sum of (error / U_jj)^2, is added to loss f64[n].
    """
    if T.is_cuda and kernels.available(T.device) is None:
        return kernels.round_columns(T, U, rules, groups, static, cost, width, loss)
    k, n = T.shape
    top = 2**rules.bits - 1
    owner = groups.tolist()
    codes = torch.empty(k, n, dtype=torch.uint8, device=T.device)
    if static is None:
        scale, zero = torch.empty(2, k // width, n, device=T.device)
        block, sub = _blocks_for(width)
    else:
        scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32).contiguous()
        block, sub = _BLOCK, _SUB
    errors = torch.empty(block, n, device=T.device)
    for begin in range(0, k, block):
        end = min(k, begin + block)
        for first in range(begin, end, sub):
            last = min(end, first + sub)
            if static is None and first % width == 0:
                own = slice(first, first + width)
                fitted = rules.fit(T[own].T, cost[own], -1)
                scale[owner[first]], zero[owner[first]] = fitted.scale[:, 0], fitted.zero[:, 0].to(torch.float32)
            for j in range(first, last):
                step, middle = scale[owner[j]], zero[owner[j]]
                code = (T[j] / step).round_().add_(middle).clamp_(0, top)
                codes[j] = code
                error = torch.sub(T[j], code.sub_(middle).mul_(step), out=errors[j - begin])
                error /= U[j, j]
                T[j + 1 : last].addr_(U[j, j + 1 : last], error, alpha=-1)
            if last < end:
                T[last:end].addmm_(U[first:last, last:end].T, errors[first - begin : last - begin], alpha=-1)
        if loss is not None:
            loss += errors[: end - begin].square().sum(0)
        if end < k:
            T[end:].addmm_(U[begin:end, end:].T, errors[: end - begin], alpha=-1)
    return codes, Grid(scale.T.contiguous(), zero.T.to(torch.int32).contiguous())


def _blocks_for(width: int) -> tuple[int, int]:
    """(block, sub-block) such that every group of `width` starts where all corrections so far have arrived.

    That is at the start of a block for rows past the block, and at the start of a sub-block for rows inside it.
    """
    if width > _BLOCK:
        block = max(size for size in range(1, _BLOCK + 1) if width % size == 0)
        return block, min(_SUB, block)
    return width * (_BLOCK // width), math.gcd(width, _SUB)


def _rounded(W: torch.Tensor, H: torch.Tensor | None, rules: _Rules, attempts: tuple[Attempt, ...]) -> Solution:
    mean = 0.0 if H is None else live_mean(H)
    cost = None
    if mean > 0:
        cost = torch.where(H.diagonal() > 0, H.diagonal(), torch.full_like(H.diagonal(), mean))
    grid = rules.fit(W, cost)
    codes = quantize(W, grid, rules.bits)
    if H is None:  # rounding by choice, without calibration: the share of W's own energy, which is what H = I gives
        loss = _share((W - dequantize(codes, grid)).double().square().sum(), W.double().square().sum())
    else:
        loss = proxy_loss(W, dequantize(codes, grid), H) if mean > 0 else math.nan
    return Solution(codes, grid, contiguous_groups(W.shape[1], rules.group_size, W.device), "rtn", loss, loss, attempts)


def _require_hessian(W: torch.Tensor, H: torch.Tensor) -> None:
    k = W.shape[1]
    if tuple(H.shape) != (k, k):
        raise NotQuantizable(f"H is {list(H.shape)} for W[{W.shape[0]}, {k}]: H must be [{k}, {k}].")
    if not all_finite(H):
        bad = ~torch.isfinite(H)
        column = int(bad.any(0).to(torch.uint8).argmax())
        raise NotQuantizable(
            f"H has {int(bad.sum())} non-finite entries, first in column {column}: calibration "
            "activations were not finite, or their squares overflowed; no damping can repair it.",
            "Run `doctor check`, and calibrate in bfloat16 or float32.",
        )
