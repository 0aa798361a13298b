"""AWQ: columns that carry large activations are scaled up before rounding, and what feeds them is scaled down.

Scaling column j of every linear that reads an input by s_j, and the input's source by 1 / s_j, leaves the function as
it is and moves rounding errors away from the columns that matter. s = rms(x)^r, or rms(x)^r / size(w)^(1-r), for the r
of a grid of 20 that loses least, no scaling among them; then each group gets the grid that loses least: its range
shortened (clipping), or fitted.

Both searches need X only as a Gram matrix: the loss of D = W - Q is tr(D H D^T), so a candidate costs one product with
H instead of a forward pass. That is exact for a linear's own output; AutoAWQ measures q, k and v behind the
whole attention, so its choices there can differ.

The source is a norm, v (for o) or up (for down), where rules/tables/architectures/ says that it is linear and that
nobody else reads it. What is stored in 16 bits is rounded first and s derived from it, so that the fold is exact for
the stored norm. A fold that changes the layer's output all the same is taken back.

Sources: Lin et al. 2023 (arXiv 2306.00978) §3.2; casper-hansen/AutoAWQ awq/quantize/quantizer.py (the grid of ratios,
clipping).
"""

from __future__ import annotations

import math

import torch

from doctor.core.recipe import DAMP
from doctor.quant.solve.grid import (
    Grid,
    contiguous_groups,
    dequantize,
    group_width,
    quantize,
    require_finite,
    store_scale,
)
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.losses import proxy_loss
from doctor.quant.solve.numerics import exact_products
from doctor.quant.solve.refine import improve
from doctor.quant.solve.solution import Solution

SHRINKS = tuple(1 - step / 20 for step in range(10))


def clip(
    W: torch.Tensor,
    H: torch.Tensor,
    start: Grid,
    width: int,
    bits: int,
    scale_dtype: torch.dtype = torch.float16,
    others: tuple[Grid, ...] = (),
) -> Grid:
    """The grid of each group of W f32[n, k] that loses least under H f32[k, k], of `start` with scales shortened to
    0.55 .. 1 and `others`.

    The loss is that of the group alone, d H_gg d^T.
    """
    n, k = W.shape
    blocks = torch.stack([H[i : i + width, i : i + width] for i in range(0, k, width)])  # [G, g, g]
    scale, zero, least = start.scale, start.zero, torch.full_like(start.scale, math.inf)
    for grid in (*(Grid(store_scale(start.scale * ratio, scale_dtype), start.zero) for ratio in SHRINKS), *others):
        D = (W - dequantize(quantize(W, grid, bits), grid)).reshape(n, -1, width).transpose(0, 1)  # [G, n, g]
        loss = (torch.bmm(D, blocks) * D).sum(-1).T
        better = loss < least
        scale, zero, least = (
            torch.where(better, grid.scale, scale),
            torch.where(better, grid.zero, zero),
            torch.where(better, loss, least),
        )
    return Grid(scale.contiguous(), zero.contiguous())


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    s: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
    damp: float = DAMP,
    scale_dtype: torch.dtype = torch.float16,
    signed: bool = False,
) -> Solution:
    """Codes of W[n, k], whose columns carry the factors s f32[k] (None: none), under H[k, k] of the scaled input.
    signed: as in grid_search.fit.

    Clipped, rounded to nearest, then refined as GPTQ's codes are: published AWQ stops before that. loss as in
    gptq.solve; rtn_loss is that of the unscaled weight on a min-max grid. Raises NotQuantizable for a non-finite W.
    """
    require_finite(W)
    W, H = W.to(torch.float32), H.to(W.device, torch.float32)
    width = group_width(W.shape[1], group_size)
    with exact_products():
        start = fit(W, bits, group_size, sym, zero_min=zero_min, scale_dtype=scale_dtype)
        fitted = fit(
            W,
            bits,
            group_size,
            sym,
            mse=True,
            weight=H.diagonal(),
            signed=signed,
            zero_min=zero_min,
            scale_dtype=scale_dtype,
        )
        grid = clip(W, H, start, width, bits, scale_dtype, (fitted,))
        codes = quantize(W, grid, bits)
        loss = proxy_loss(W, dequantize(codes, grid), H)
        better = improve(
            W,
            H,
            codes,
            grid,
            bits=bits,
            group_size=group_size,
            sym=sym,
            zero_min=zero_min,
            damp=damp,
            scale_dtype=scale_dtype,
        )
        gained = proxy_loss(W, dequantize(*better), H)
        if gained < loss:
            loss, (codes, grid) = gained, better
        plain = W if s is None else W / s
        first = start if s is None else fit(plain, bits, group_size, sym, zero_min=zero_min, scale_dtype=scale_dtype)
        rounded = dequantize(quantize(plain, first, bits), first)
        rtn_loss = proxy_loss(W, rounded if s is None else rounded * s, H)
    return Solution(codes, grid, contiguous_groups(W.shape[1], group_size, W.device), "awq", loss, rtn_loss, ())
