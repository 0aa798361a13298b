"""Rounding to nearest (RTN): no calibration, or the fallback where no factor of the Hessian exists."""

from __future__ import annotations

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.solve.factor import Attempt
from doctor.quant.solve.grid import (
    Grid,
    GridParams,
    ScaleKind,
    dequantize,
    quantize,
    require_finite,
)
from doctor.quant.solve.grid_search import fit_owned, fit_with, owners
from doctor.quant.solve.losses import energies, share_of
from doctor.quant.solve.numerics import live_mean, nonfinite_columns, row_chunks
from doctor.quant.solve.solution import Solution
from doctor.quant.solve.square import Square
from doctor.quant.solving_budget import CHUNK_BYTES


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
    scale_dtype: ScaleKind = torch.float16,
    squared: bool = False,
    wide: int = 0,
) -> Solution:
    """RTN of W[n, k]. With H, mse weighs columns by its diagonal and the losses are known; without, they are NaN."""
    require_finite(W)
    if H is not None:
        require_hessian(W, H)
        H = H.to(W.device, torch.float32)
    return rounded(W, H, GridParams(bits, group_size, sym, mse, signed, zero_min, scale_dtype, squared, wide), ())


def rounded(
    W: torch.Tensor, H: torch.Tensor | Square | None, params: GridParams, attempts: tuple[Attempt, ...]
) -> Solution:
    """RTN of finite W[n, k] on grids fitted with columns weighed by diag(H), dead ones by its mean."""
    mean, cost = 0.0, None
    if H is not None and (mean := live_mean(H)) > 0:
        cost = torch.where(H.diagonal() > 0, H.diagonal(), torch.full_like(H.diagonal(), mean))
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    grids: list[Grid] = []
    g_idx = owners(params, _column_sizes(W) if cost is None else cost)
    index = g_idx if params.wide else None  # of neighbours
    shared = fit_owned(params, W.to(torch.float32), cost, g_idx) if params.squared else None
    sums = torch.zeros(2, dtype=torch.float64, device=W.device)  # of the errors' energy, and of the weights'
    for rows in row_chunks(W.shape, CHUNK_BYTES):
        part = W[rows].to(torch.float32)
        grid = (
            shared._replace(scale=shared.scale[rows], zero=shared.zero[rows])
            if shared is not None
            else fit_with(params, part, cost)
        )
        codes[rows] = quantize(part, grid, params.code_bits, index, params.scale_dtype)
        E = part - dequantize(codes[rows], grid, index)
        grids.append(grid)
        if H is None:  # rounding by choice, without calibration: the share of W's own energy, which is what H = I gives
            sums += torch.stack([x.double().square().sum() for x in (E, part)])
        elif mean > 0:
            sums += torch.stack([energies(E, H).sum(), energies(part, H).sum()])
    loss = share_of(*sums) if H is None else float(sums[0] / sums[1])
    grid = shared or Grid(torch.cat([g.scale for g in grids]), torch.cat([g.zero for g in grids]))
    return Solution(codes, grid, g_idx, "rtn", loss, loss, attempts)


def _column_sizes(W: torch.Tensor) -> torch.Tensor:
    """Sums of squares f32[k], a chunk of rows at a time."""
    parts = [W[rows].to(torch.float32).square().sum(0) for rows in row_chunks(W.shape, CHUNK_BYTES)]
    return torch.stack(parts).sum(0)


def require_hessian(W: torch.Tensor, H: torch.Tensor | Square) -> None:
    """NotQuantizable where H is of another shape, or not finite."""
    k = W.shape[1]
    shape = [len(H)] * 2 if isinstance(H, Square) else list(H.shape)
    if shape != [k, k]:
        raise NotQuantizable(
            _("H is {shape} for W[{rows}, {k}]: H must be [{k}, {k}].", shape=shape, rows=W.shape[0], k=k)
        )
    bad = nonfinite_columns(H.strips() if isinstance(H, Square) else [H])
    if bad is not None:
        raise NotQuantizable(
            _(
                "H has {n} non-finite entries, first in column {column}: calibration activations were not "
                "finite, or their "
                "squares overflowed; no damping can repair it.",
                n=int(bad.sum()),
                column=int((bad > 0).to(torch.uint8).argmax()),
            ),
            _("Run `doctor check`, and calibrate in bfloat16 or float32."),
        )
