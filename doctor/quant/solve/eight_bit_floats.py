"""Rounding of a weight to 8-bit floats under a scale for each row, tile or group of columns: FP8 and MXFP8.

An 8-bit float has three bits of mantissa at every size, so a search for a better scale gains nothing that shows: the
scale brings the largest value to 448 and every weight goes to the nearest float. Scales are rounded to what is stored
before any code is computed.

Source: vllm-project/compressed-tensors 0.20 quantization/utils/helpers.py (calculate_qparams).
"""

from __future__ import annotations

import torch

from doctor.formats.grid import E4M3, Grid, GridKind, as_e4m3, contiguous_groups, group_width, store_scale
from doctor.quant.solve.float_scale import E4M3_MOST, power_of
from doctor.quant.solve.grid import require_finite
from doctor.quant.solve.losses import share_of
from doctor.quant.solve.solution import Solution


def round_to_floats(W: torch.Tensor, kind: GridKind) -> Solution:
    """W[n, k] rounded as kind says: codes u8[n, k] are the bits of E4M3. Raises NotQuantizable for a non-finite W."""
    require_finite(W)
    W = W.to(torch.float32)
    scale = scales(W, kind)
    width = W.shape[1] // scale.shape[1]
    by_column = scale.repeat_interleave(width, 1)
    codes = (W / by_column).clamp_(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).view(torch.uint8)
    error = as_e4m3(codes).to(torch.float32).mul_(by_column).sub_(W)
    loss = share_of(error.double().square().sum(), W.double().square().sum())
    grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), E4M3)
    g_idx = contiguous_groups(W.shape[1], width, W.device)
    return Solution(codes, grid, g_idx, "rtn", loss, loss, ())


def scales(W: torch.Tensor, kind: GridKind) -> torch.Tensor:
    """f32[n, G] of W f32[n, k], each exact in kind.scale_dtype; rows of a tile share theirs. 1 for zeros."""
    n, k = W.shape
    width = kind.tile[1] if kind.tile else group_width(k, kind.group_size)
    return scales_of(W.abs().reshape(n, -1, width).amax(2), kind)


def scales_of(spans: torch.Tensor, kind: GridKind) -> torch.Tensor:
    """The same from the largest weight of each group, f32[n, G]."""
    if kind.tile:
        rows = kind.tile[0]
        spans = spans.reshape(-1, rows, spans.shape[1]).amax(1).repeat_interleave(rows, 0)
    if kind.scale_dtype == "F8_E8M0":
        found = power_of(spans) / 256
        return torch.where(spans > 0, found.clamp(2.0**-127, 2.0**127), 1.0)
    return store_scale(torch.where(spans > 0, spans / E4M3_MOST, 1.0), kind.torch_scale_dtype)
