"""Losses of a quantized linear under its Hessian: tr(E H E^T) with E = W - Q, as shares of tr(W H W^T)."""

from __future__ import annotations

import torch

from doctor.quant.solve.grid import GridParams, dequantize, quantize
from doctor.quant.solve.grid_search import fit_owned, owners
from doctor.quant.solve.numerics import row_chunks
from doctor.quant.solve.square import Square
from doctor.quant.solving_budget import CHUNK_BYTES

# Rows of W whose losses are taken exactly: where H is wide, 128 come no closer than 64 (SmolLM2-135M, plain inputs and
# one dominant direction); where it is narrow, more cost nothing.
SAMPLE, SAMPLE_WEIGHTS = 64, 1 << 17
_CLEAR = 0.8
_POWER_STEPS = 3  # from the largest column; more bring nothing where one direction dominates
_ROWS_AT_A_TIME = 128  # so that intermediate values stay in the cache


def loss_shares(
    W: torch.Tensor, H: torch.Tensor | Square, params: GridParams, cost: torch.Tensor, loss: torch.Tensor, most: int
) -> tuple[float, float]:
    """(loss, rtn_loss) as shares of tr(W H W^T), from the loss f64[n] of each row.

    Up to `most` rows exact. Above, what else is needed is taken from that many rows at equal distances, and scaled to
    all: the energy of W by what _likely_energies gives for every row (within 1 to 2 %), and the loss of RTN by ours on
    the same rows (within 10 %, measured with one dominant direction). Where the two losses come closer than _CLEAR, all
    rows are taken after all: which is the less is never a guess. A product with H for all rows would cost as much as
    the loop does.
    """
    n, g_idx = len(W), owners(params, H.diagonal())
    index = g_idx if params.wide else None  # of neighbours
    rows = torch.arange(min(n, most), device=W.device)
    rows = rows if n <= most else rows * n // most
    sums = torch.zeros(2, dtype=torch.float64, device=W.device)
    for chunk in row_chunks((len(rows), W.shape[1]), CHUNK_BYTES):
        part = W[rows[chunk]].to(torch.float32)
        grid = fit_owned(params, part, cost, g_idx)
        plain = quantize(part, grid, params.code_bits, index, params.scale_dtype)
        E = part - dequantize(plain, grid, index)
        sums += energies(torch.cat([part, E]), H).view(2, -1).sum(1)
    whole, rounded = sums
    ours = loss[rows].sum()
    if n > most:
        if not ours < _CLEAR * rounded:
            return loss_shares(W, H, params, cost, loss, n)
        own = _likely_energies(W, H)
        scaled = own.sum() / own[rows].sum() if own[rows].sum() > 0 else 1.0
        whole, rounded = whole * scaled, rounded * (loss.sum() / ours if ours > 0 else scaled)
    return share_of(loss.sum(), whole), share_of(rounded, whole)


def _likely_energies(W: torch.Tensor, H: torch.Tensor | Square) -> torch.Tensor:
    """About w H w^T of each row, f64[n]: H as its strongest direction, where one may hold most of the energy, and a
    diagonal.
    """
    largest = int(H.diagonal().argmax())
    v = H.column(largest) if isinstance(H, Square) else H[:, largest]
    for _ in range(_POWER_STEPS):
        v = v / v.norm()
        v = H.product(v[None])[0] if isinstance(H, Square) else H @ v
    strength = v.norm()
    v = v / strength
    rest = (H.diagonal() - strength * v.square()).clamp_min(0)
    parts = (some.to(torch.float32) for some in W.split(_ROWS_AT_A_TIME))
    return torch.cat([strength * (some @ v).square() + some.square() @ rest for some in parts]).to(torch.float64)


def proxy_loss(W: torch.Tensor, Q: torch.Tensor, H: torch.Tensor | Square) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - Q: the share of the output's energy that quantizing changes."""
    E = W - Q
    return float(_energy(E, H) / _energy(W, H))


def share_of(part: torch.Tensor, whole: torch.Tensor) -> float:
    """part / whole; 0 where both are 0, as for a weight of zeros, which every grid holds exactly."""
    return 0.0 if part == 0 else float(part / whole)


def _energy(E: torch.Tensor, H: torch.Tensor | Square) -> torch.Tensor:
    """tr(E H E^T), summed over rows in float64."""
    return energies(E, H).sum()


def energies(E: torch.Tensor, H: torch.Tensor | Square) -> torch.Tensor:
    """e H e^T of each row, f64[n]."""
    return ((H.product(E) if isinstance(H, Square) else E @ H) * E).sum(1).to(torch.float64)
