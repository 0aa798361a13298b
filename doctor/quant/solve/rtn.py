"""Rounding to nearest (RTN): no calibration, or the fallback where no factor of the Hessian exists."""

from __future__ import annotations

import math

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.solve.factor import Attempt
from doctor.quant.solve.grid import GridParams, ScaleKind, contiguous_groups, dequantize, quantize, require_finite
from doctor.quant.solve.grid_search import fit_with
from doctor.quant.solve.losses import proxy_loss, share_of
from doctor.quant.solve.numerics import all_finite
from doctor.quant.solve.solution import Solution
from doctor.quant.solve.spectrum import live_mean


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
) -> Solution:
    """RTN of W[n, k]. With H, mse weighs columns by its diagonal and the losses are known; without, they are NaN."""
    require_finite(W)
    if H is not None:
        require_hessian(W, H)
        H = H.to(W.device, torch.float32)
    return rounded(W.to(torch.float32), H, GridParams(bits, group_size, sym, mse, signed, zero_min, scale_dtype), ())


def rounded(W: torch.Tensor, H: torch.Tensor | None, params: GridParams, attempts: tuple[Attempt, ...]) -> Solution:
    """RTN on grids fitted with columns weighed by diag(H), dead ones by its mean."""
    mean, cost = 0.0, None
    if H is not None and (mean := live_mean(H)) > 0:
        cost = torch.where(H.diagonal() > 0, H.diagonal(), torch.full_like(H.diagonal(), mean))
    grid = fit_with(params, W, cost)
    codes = quantize(W, grid, params.bits, scale_dtype=params.scale_dtype)
    if H is None:  # rounding by choice, without calibration: the share of W's own energy, which is what H = I gives
        loss = share_of((W - dequantize(codes, grid)).double().square().sum(), W.double().square().sum())
    else:
        loss = proxy_loss(W, dequantize(codes, grid), H) if mean > 0 else math.nan
    return Solution(
        codes, grid, contiguous_groups(W.shape[1], params.group_size, W.device), "rtn", loss, loss, attempts
    )


def require_hessian(W: torch.Tensor, H: torch.Tensor) -> None:
    k = W.shape[1]
    if tuple(H.shape) != (k, k):
        raise NotQuantizable(
            _("H is {shape} for W[{rows}, {k}]: H must be [{k}, {k}].", shape=list(H.shape), rows=W.shape[0], k=k)
        )
    if not all_finite(H):
        bad = ~torch.isfinite(H)
        column = int(bad.any(0).to(torch.uint8).argmax())
        raise NotQuantizable(
            _(
                "H has {n} non-finite entries, first in column {column}: calibration activations were not "
                "finite, or their "
                "squares overflowed; no damping can repair it.",
                n=int(bad.sum()),
                column=column,
            ),
            _("Run `doctor check`, and calibrate in bfloat16 or float32."),
        )
