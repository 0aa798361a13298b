"""One quantized linear as every solver returns it: codes, grid, groups, losses, attempts to factor its Hessian."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.quant.solve.factor import Attempt
from doctor.quant.solve.grid import Grid, dequantize
from doctor.quant.solve.numerics import row_chunks

_CHUNK_BYTES = 1 << 25


@dataclass(frozen=True)
class Solution:
    """One quantized linear. Losses are tr(E H E^T) / tr(W H W^T), E = W - Q, H undamped; NaN where nothing was active.

    For many rows they are estimated from a sample (see losses.loss_shares).
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
        if len(self.grid.scale) != len(self.codes):  # scales of tiles of rows
            return dequantize(self.codes, self.grid, self.g_idx)
        W = torch.empty(self.codes.shape, device=self.codes.device)
        for rows in row_chunks(W.shape, _CHUNK_BYTES):
            grid = self.grid._replace(scale=self.grid.scale[rows], zero=self.grid.zero[rows])
            W[rows] = dequantize(self.codes[rows], grid, self.g_idx)
        return W
