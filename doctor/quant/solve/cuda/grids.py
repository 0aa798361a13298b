"""Launches cuda/grid_search.cu and cuda/awq_difference.cu. Twins in torch: grid_search.py and awq_search.py."""

from __future__ import annotations

import torch

from doctor.quant.solve.cuda.driver import Engine
from doctor.quant.solve.cuda.launcher import (
    address,
    device_grid_params,
    engine_for,
    require_countable,
    require_tensor,
    stream_of,
)
from doctor.quant.solve.cuda.structs import DTYPES, Difference, Search
from doctor.quant.solve.grid import Grid, group_width


def fit(
    W: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    mse: bool = False,
    weight: torch.Tensor | None = None,
    signed: bool = False,
    zero_min: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    engine: Engine | None = None,
) -> Grid:
    """grid.fit without its judgement: a group that is not finite, or whose scale does not fit scale_dtype, gets a scale
    that is not finite."""
    engine = engine or engine_for(W.device)
    n, k = W.shape
    width = group_width(k, group_size)
    W = require_tensor("W", W.to(torch.float32), torch.float32, W.device)
    weight = (
        None
        if weight is None
        else require_tensor("weight", weight.to(W.device, torch.float32), torch.float32, W.device)
    )
    scale = torch.empty(n, k // width, dtype=torch.float32, device=W.device)
    zero = torch.empty(n, k // width, dtype=torch.int32, device=W.device)
    require_countable(scale.numel(), n, k)
    each = next((each for each in (1, 2, 4) if width <= 32 * each), None)
    search = Search(
        address(W), address(weight), address(engine.candidates(W.device)), address(scale), address(zero), n, k, k, width
    )
    engine.launch(
        f"grid_search_{each or 'wide'}",
        "grid_search",
        (-(-scale.numel() // 4), 1),
        128,
        0,
        (search, device_grid_params(bits, sym, mse, signed, zero_min, scale_dtype)),
        stream_of(W),
        f"W[{n}, {k}] by {width}",
    )
    return Grid(scale, zero)


def awq_difference(
    W: torch.Tensor,
    s: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    zero_min: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    engine: Engine | None = None,
) -> torch.Tensor:
    """D f32[n, k] = grid(W * s) / s - W with min-max grids: a candidate s f32[k] > 0 of AWQ's search costs tr(D H
    D^T).
    """
    engine = engine or engine_for(W.device)
    n, k = W.shape
    width = group_width(k, group_size)
    require_countable(n * (k // width), n, k)
    W, s = W.contiguous(), require_tensor("s", s, torch.float32, W.device)
    out = torch.empty(n, k, device=W.device)
    difference = Difference(address(W), address(s), address(out), n, k, width, DTYPES[W.dtype])
    engine.launch(
        "awq_difference",
        "awq_difference",
        (-(-n * (k // width) // 4), 1),
        128,
        0,
        (difference, device_grid_params(bits, sym, False, False, zero_min, scale_dtype)),
        stream_of(W),
        f"W[{n}, {k}] by {width}",
    )
    return out
