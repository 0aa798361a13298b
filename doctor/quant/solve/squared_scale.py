"""Scales of EXL2: in each group one float16 for all rows, times the square of 1..16 for each row.

Steps are 12 % apart at the top and a factor of 4 at the bottom, so rounding the scale that a row would like is not
enough: of the two squares around it the one with the smaller error is taken, and of several factors for the group the
one with the least sum over its rows. An error in a column counts by what it costs (GPTQ's pivots, or diag(H)).

Source: turboderp/exllamav2 conversion/qparams.py, conversion/adaptivegptq.py, which rounds the root and tries factors
of 0.70 to 1.20 by unweighted errors.
"""

from __future__ import annotations

import torch

from doctor.formats.grid import squared_scale
from doctor.quant.solve.grid import Grid, nearest
from doctor.quant.solve.numerics import row_chunks

FACTORS = tuple(0.60 + 0.05 * step for step in range(13))  # of the largest scale of a group: 0.60 to 1.20
MOST_BASE = 65504 / 256  # q_scale_max is 256 times the base, in float16
_CHUNK_BYTES = 1 << 22


def snapped(grid: Grid, W: torch.Tensor, cost: torch.Tensor | None, bits: int) -> Grid:
    """The grid with scales that EXL2 stores, for W f32[n, k] in groups of neighbours; its divisor holds each group's
    float16. grid: what each group would like. cost f32[k]: of an error in a column, None for equal ones.
    """
    n, k = W.shape
    groups = grid.scale.shape[1]
    most = grid.scale.amax(0) / 256  # by qs = 16
    weight = torch.ones(k, device=W.device) if cost is None else cost.to(W.device, torch.float32)
    weight = weight.reshape(1, groups, -1)
    bases = torch.stack([_stored(most * factor) for factor in FACTORS])  # [factors, G]
    errors = torch.zeros(bases.shape, dtype=torch.float64, device=W.device)
    for rows in row_chunks(W.shape, _CHUNK_BYTES):
        part = W[rows].to(torch.float32).reshape(-1, groups, k // groups)
        for at, base in enumerate(bases):
            errors[at] += _best_roots(part, weight, grid.scale[rows], base, bits)[1].sum(0).to(torch.float64)
    base = bases.gather(0, errors.argmin(0, keepdim=True))[0]
    roots = torch.empty(n, groups, device=W.device)
    for rows in row_chunks(W.shape, _CHUNK_BYTES):
        part = W[rows].to(torch.float32).reshape(-1, groups, k // groups)
        roots[rows] = _best_roots(part, weight, grid.scale[rows], base, bits)[0]
    return Grid(squared_scale(roots, base), torch.full_like(grid.zero, 2 ** (bits - 1)), "", base)


def _stored(base: torch.Tensor) -> torch.Tensor:
    """A float16 that is not 0, as f32."""
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    return base.clamp(least, MOST_BASE).to(torch.float16).to(torch.float32)


def _best_roots(
    part: torch.Tensor, weight: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(roots, errors) f32[r, G] of the better square around each wanted scale; part f32[r, G, g]."""
    low = (wanted / base).sqrt().floor().clamp(1, 16)
    best, least = low, None
    for roots in (low, (low + 1).clamp_max(16)):
        scale = squared_scale(roots, base)[..., None]
        middle = torch.tensor(float(2 ** (bits - 1)), device=part.device)
        off = nearest(part / scale, middle, bits, torch.float16).sub_(middle).mul_(scale).sub_(part).square_()
        error = off.mul_(weight).sum(-1)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        best = torch.where(better, roots, best)
        least = error if least is None else torch.where(better, error, least)
    assert least is not None
    return best, least
