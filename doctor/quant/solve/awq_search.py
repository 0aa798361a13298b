"""AWQ's search for the scales of a group of linears that share an input.

It needs X only as a Gram matrix: the loss of D = W - Q is tr(D H D^T), so a candidate costs one product with H
instead of a forward pass. That is exact for a linear's own output. AutoAWQ measures q, k and v behind the whole
attention, so its choices there can differ.

Source: Lin et al. 2023 (arXiv 2306.00978) §3.2; casper-hansen/AutoAWQ awq/quantize/quantizer.py (the grid of ratios).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from operator import add

import torch

from doctor.core.errors import NotQuantizable
from doctor.quant.solve import cuda
from doctor.quant.solve.awq_source import Source
from doctor.quant.solve.grid import dequantize, group_width, quantize, require_finite
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.numerics import exact_products

RATIOS = tuple(step / 20 for step in range(20))
# Rows of each weight, the same for all candidates: every one is judged on few, those that lose least there on more.
# Twelve hold the one that is best on more in 12 of 12 groups of linears of SmolLM2-135M, eight miss it once or more at
# 64 or 256 rows.
FIRST_ROWS, SEARCH_ROWS, FINALISTS = 128, 512, 12


def find_scales(
    weights: list[torch.Tensor],
    H: torch.Tensor,
    source: Source,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
) -> tuple[torch.Tensor, str]:
    """(s f32 of the source's channels, how it was found or ""): the least sum of tr(D H D^T) over weights [n_i, k] that
    share H f32[k, k].

    The sum is over rows of each weight at equal distances, and counts for all of them. s is 1 with "" where nothing is
    better, and for channels that calibration never reached.
    """
    energy = source.gather(H.diagonal())
    live = energy > 0
    size = torch.where(live, energy, torch.ones_like(energy)).sqrt()
    filled = source.gather(_filled(weights, group_size)).clamp_min(1e-4)
    for W in weights:
        require_finite(W)
    candidates = [("", torch.ones_like(size))]
    candidates += [(f"rms(x)^{ratio:g}", size**ratio) for ratio in RATIOS[1:]]
    candidates += [
        (f"rms(x)^{ratio:g} / size(w)^{1 - ratio:g}", size**ratio / filled ** (1 - ratio)) for ratio in RATIOS
    ]
    tried = []
    for _, s in candidates:
        middle = (s.masked_fill(~live, 0).amax() * s.masked_fill(~live, math.inf).amin()).sqrt()
        tried.append(torch.where(live, s / middle, torch.ones_like(s)).clamp(1e-4, 1e4))

    def losses(numbers: Iterable[int], rows: int) -> dict[int, float]:
        sampled = [_some_rows(W, rows) for W in weights]
        found: dict[int, torch.Tensor] = {}
        for number in numbers:
            columns = source.spread(tried[number])
            parts = (_loss(_difference(W, columns, bits, group_size, sym, zero_min), H) / share for W, share in sampled)
            found[number] = reduce(add, parts)
        values = torch.stack(list(found.values())).tolist()  # the one wait for a device
        return dict(zip(found, values, strict=True))

    with exact_products():
        values = losses(range(len(tried)), FIRST_ROWS)
        if max(map(len, weights)) > FIRST_ROWS:
            values = losses(sorted({0, *sorted(values, key=values.__getitem__)[:FINALISTS]}), SEARCH_ROWS)
    best = min(values, key=values.__getitem__)
    return (tried[best], candidates[best][0]) if values[best] < math.inf else (torch.ones_like(size), "")


def _loss(D: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T), f64[]; Inf where D is not finite, so that such a candidate is none."""
    return ((D @ H) * D).sum(dtype=torch.float64).nan_to_num(nan=math.inf)


def _difference(
    W: torch.Tensor, columns: torch.Tensor, bits: int, group_size: int, sym: bool, zero_min: int
) -> torch.Tensor:
    """W * columns, rounded on min-max grids, brought back by columns, less W: f32[n, k]; not finite where no float16
    holds a scale.
    """
    if W.is_cuda and cuda.available(W.device) is None:
        return cuda.awq_difference(W, columns, bits, group_size, sym, zero_min=zero_min)
    scaled = W * columns
    try:
        grid = fit(scaled, bits, group_size, sym, zero_min=zero_min)
    except NotQuantizable:
        return torch.full_like(scaled, math.nan)
    return dequantize(quantize(scaled, grid, bits), grid) / columns - W


def _filled(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """How far the weights of a column fill their groups' ranges on average, f32[k] in 0..1: a column of small ones can
    grow for nothing.
    """

    def filled(W: torch.Tensor) -> torch.Tensor:
        size = W.abs().to(torch.float32).reshape(len(W), -1, group_width(W.shape[1], group_size))
        return (size / size.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(W.shape).sum(0)

    return reduce(add, map(filled, weights)) / sum(map(len, weights))


def _some_rows(W: torch.Tensor, rows: int) -> tuple[torch.Tensor, float]:
    """(at most `rows` rows of W at equal distances, their share of all)."""
    n = len(W)
    if n <= rows:
        return W, 1.0
    return W[torch.arange(rows, device=W.device) * n // rows], rows / n
