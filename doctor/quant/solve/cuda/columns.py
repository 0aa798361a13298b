"""Launches cuda/gptq_block.cu: GPTQ's loop over columns and its refinement. In torch: columns.py and refine.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from doctor.core.errors import CudaError
from doctor.core.messages import _
from doctor.quant.solve.cuda.driver import Engine
from doctor.quant.solve.cuda.grids import fit
from doctor.quant.solve.cuda.launcher import address, device_grid_params, engine_for, require_tensor, stream_of
from doctor.quant.solve.cuda.structs import BLOCK, Columns, Refinement
from doctor.quant.solve.grid import Grid


def round_columns(
    T: torch.Tensor,
    U: torch.Tensor,
    params,
    groups: torch.Tensor,
    static: Grid | None,
    cost: torch.Tensor | None = None,
    width: int = 0,
    loss: torch.Tensor | None = None,
    *,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, Grid]:
    """gptq._round_columns: a launch and a product for every 128 columns. A non-finite weight makes its row's later
    errors NaN, takes code 0 and touches no other row.
    """
    engine = engine or engine_for(T.device)
    k, n = T.shape
    device = T.device
    if not T.is_contiguous():
        raise CudaError(
            _("T[{k}, {n}] has strides {strides}; must be contiguous.", k=k, n=n, strides=T.stride()),
            _("This is an internal error (a bug in doctor): report it with this text."),
        )
    U, groups = (
        require_tensor("U", U, torch.float32, device),
        require_tensor("groups", groups.to(torch.int32), torch.int32, device),
    )
    cost = None if cost is None else require_tensor("cost", cost, torch.float32, device)
    block, inside = BLOCK, 0
    if static is None:
        scale, zero = torch.empty(2, k // width, n, device=device)
        if fits(width):
            inside = width
        else:
            block = max(size for size in range(1, BLOCK + 1) if width % size == 0)
    else:
        scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32).contiguous()
    codes = torch.empty(k, n, dtype=torch.uint8, device=device)
    errors = torch.empty(BLOCK, n, device=device)
    grid_params = device_grid_params(
        params.bits, params.sym, params.mse, params.signed, params.zero_min, params.scale_dtype
    )
    threads = threads_per_block(engine, n, shared_bytes)
    for begin in range(0, k, block):
        count = min(block, k - begin)
        if static is None and not inside and begin % width == 0:
            fitted = fit(
                T[begin : begin + width].T,
                params.bits,
                -1,
                params.sym,
                mse=params.mse,
                signed=params.signed,
                weight=None if cost is None else cost[begin : begin + width],
                zero_min=params.zero_min,
                scale_dtype=params.scale_dtype,
                engine=engine,
            )
            scale[begin // width], zero[begin // width] = fitted.scale[:, 0], fitted.zero[:, 0].to(torch.float32)
        columns = Columns(
            address(T),
            address(U),
            address(groups),
            address(scale),
            address(zero),
            address(codes),
            address(errors),
            address(loss),
            address(cost),
            address(engine.candidates(device)),
            n,
            k,
            begin,
            count,
            inside,
        )
        engine.launch(
            "gptq_block",
            "gptq_block",
            (-(-n // threads), 1),
            threads,
            shared_bytes(threads),
            (columns, grid_params),
            stream_of(T),
            f"T[{k}, {n}], columns {begin}..{begin + count}",
        )
        if begin + count < k:
            T[begin + count :].addmm_(U[begin : begin + count, begin + count :].T, errors[:count], alpha=-1)
    return codes, Grid(scale.T.contiguous(), zero.T.to(torch.int32).contiguous())


def refine(
    E: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    groups: torch.Tensor,
    params,
    width: int = 0,
    loss: torch.Tensor | None = None,
    *,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, Grid]:
    """gptq.descend, and a new scale for each group after its codes where its `width` fits(): (codes u8[k, n], grid).

    E f32[k, n] = (W - Q)^T and codes u8[k, n], which is changed, with H f32[k, k] damped and groups i32[k] in one order
    of columns, in which groups are runs of `width` (0: scales stay as they are). The change of the loss is added to
    loss f64[n].
    """
    engine = engine or engine_for(E.device)
    k, n = E.shape
    device = E.device
    H, groups = (
        require_tensor("H", H, torch.float32, device),
        require_tensor("groups", groups.to(torch.int32), torch.int32, device),
    )
    scale, zero = grid.scale.T.clone(memory_format=torch.contiguous_format), grid.zero.T.to(torch.float32).contiguous()
    pull = H @ E
    moved = torch.empty(BLOCK, n, device=device)
    grid_params = device_grid_params(
        params.bits, params.sym, params.mse, params.signed, params.zero_min, params.scale_dtype
    )
    threads = threads_per_block(engine, n, shared_bytes_to_refine)
    for begin in range(0, k, BLOCK):
        count = min(BLOCK, k - begin)
        arguments = Refinement(
            address(H),
            address(groups),
            address(scale),
            address(zero),
            address(codes),
            address(pull),
            address(moved),
            address(loss),
            n,
            k,
            begin,
            count,
            width,
        )
        engine.launch(
            "gptq_refine",
            "gptq_block",
            (-(-n // threads), 1),
            threads,
            shared_bytes_to_refine(threads),
            (arguments, grid_params),
            stream_of(E),
            f"E[{k}, {n}], columns {begin}..{begin + count}",
        )
        if begin + count < k:
            pull[begin + count :].addmm_(H[begin + count :, begin : begin + count], moved[:count])
    return codes, Grid(scale.T.contiguous(), grid.zero)


def fits(width: int) -> bool:
    """Whether gptq_block.cu can fit the grid of a group of `width` columns inside a block."""
    return width % 16 == 0 and BLOCK % width == 0


def shared_bytes(threads: int) -> int:
    """Bytes of shared memory of a block of gptq_block."""
    return (BLOCK + threads) * BLOCK * 4


def shared_bytes_to_refine(threads: int) -> int:
    return shared_bytes(threads) + BLOCK * threads


def threads_per_block(engine: Engine, n: int, shared: Callable[[int], int]) -> int:
    """Rows a block: as many as the device's shared memory holds while every multiprocessor still gets a block."""
    for threads in (128, 64):
        if shared(threads) <= engine.shared_optin and -(-n // threads) >= engine.multiprocessors:
            return threads
    return 32
