"""GPTQ's loop over columns in torch: rounds one column after the other and corrects the columns still to come.

The definition of the CUDA kernel gptq_block, and the CPU's way where the native library is absent.
"""

from __future__ import annotations

import math

import torch

from doctor.quant.solve import cuda
from doctor.quant.solve.grid import Grid, GridParams, nearest
from doctor.quant.solve.grid_search import fit_with

BLOCK = 128
SUB = 16


def round_columns(
    T: torch.Tensor,
    U: torch.Tensor,
    params: GridParams,
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
    if T.is_cuda and cuda.available(T.device) is None and not (params.floats or params.wide):
        return cuda.round_columns(T, U, params, groups, static, cost, width, loss)
    k, n = T.shape
    owner = groups.tolist()
    codes = torch.empty(k, n, dtype=torch.uint8, device=T.device)
    if static is None:
        scale, zero = torch.empty(2, k // width, n, device=T.device)
        block, sub = _blocks_for(width)
    else:
        scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32).contiguous()
        block, sub = BLOCK, SUB
    errors = torch.empty(block, n, device=T.device)
    for begin in range(0, k, block):
        end = min(k, begin + block)
        for first in range(begin, end, sub):
            last = min(end, first + sub)
            if static is None and first % width == 0:
                own = slice(first, first + width)
                fitted = fit_with(params, T[own].T, None if cost is None else cost[own], -1)
                scale[owner[first]], zero[owner[first]] = fitted.scale[:, 0], fitted.zero[:, 0].to(torch.float32)
            for j in range(first, last):
                step, middle = scale[owner[j]], zero[owner[j]]
                code = nearest(T[j] / step, middle, params.code_bits, params.scale_dtype)
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
    if width > BLOCK:
        block = max(size for size in range(1, BLOCK + 1) if width % size == 0)
        return block, min(SUB, block)
    return width * (BLOCK // width), math.gcd(width, SUB)
