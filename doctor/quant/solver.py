"""The native loops of cuda/host/solve.c: the grid search and the two loops over columns, on CPU tensors in float32.

grid.py and gptq.py ask here first and go on in torch where the answer is None or False: no library, or another device.
Rows are shared among as many threads as torch has; a row's result does not depend on how they are shared.
"""
from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from doctor import native

BLOCK = 128                     # columns at a time, BLOCK of solve.c
_WORK_OF_A_THREAD = 1 << 16     # weights below which a second thread costs more than it brings
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Rule(ctypes.Structure):
    """struct grid_rule of solve.c."""

    _fields_ = [*((name, ctypes.c_float) for name in ("top", "half", "zero_min")),
                *((name, ctypes.c_int32) for name in ("sym", "turn", "mse", "dtype", "ratios", "fine", "refits"))]


def note() -> str:
    """One line for a run's notes where torch does the work of the native loops; empty where they run."""
    if native.level():
        return ""
    return ("the native library is absent or turned off: grid searches and column loops run in torch, which gives the "
            "same quality and takes two to four times as long a linear")


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the native loops can take these tensors."""
    return native.level() is not None and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def fit(W: torch.Tensor, cost: torch.Tensor | None, width: int, rule: Rule, candidates: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(scale f32[n, G], zero i32[n, G]) of finite W f32[n, k] in groups of `width`, or None.

    cost f32[k] or None; candidates f32[ratios + fine]. A scale past the stored dtype is Inf.
    """
    call = native.function("doctor_fit_grid") if usable(W) else None
    if call is None:
        return None
    W, candidates = W.contiguous(), candidates.contiguous()
    cost = None if cost is None else cost.contiguous()
    n, k = W.shape
    scale = torch.empty(n, k // width)
    zero = torch.empty(n, k // width, dtype=torch.int32)

    def part(begin: int, end: int) -> None:
        scratch = torch.empty(2 * (width + 32))
        call(_at(W), _at(cost), _i64(k), _i64(width), _i64(begin), _i64(end), ctypes.byref(rule), _at(candidates), _at(scale),
             _at(zero), _at(scratch))

    _share(n, n * k, part)
    return scale, zero


def round_columns(T: torch.Tensor, U: torch.Tensor, owner: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int,
                  codes: torch.Tensor, errors: torch.Tensor) -> None:
    """The columns of one block (at most 128): T f32[count, n], U f32[count, count] (a view), owner i32[count], scale and zero

    f32[G, n]. Fills codes u8[count, n] and errors f32[count, n]; T stays as it is.
    """
    call = native.function("doctor_round_columns")
    count, n = T.shape

    def part(begin: int, end: int) -> None:
        scratch = torch.empty(BLOCK * BLOCK)
        call(_at(T), _i64(n), _at(U), _i64(U.stride(0)), _i64(count), _at(owner), _at(scale), _at(zero), ctypes.c_float(top),
             _at(codes), _at(errors), _i64(begin), _i64(end), _at(scratch))

    _share(n, n * count, part)


def descend(T: torch.Tensor, H: torch.Tensor, owner: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int,
            pull: torch.Tensor, error: torch.Tensor, codes: torch.Tensor, moved: torch.Tensor) -> None:
    """One block of the coordinate descent: T, pull, error and moved f32[count, n], H f32[count, count] (a view), the rest as above.

    Updates error, fills codes and moved.
    """
    call = native.function("doctor_descend")
    count, n = T.shape

    def part(begin: int, end: int) -> None:
        scratch = torch.empty(BLOCK * BLOCK)
        call(_at(T), _i64(n), _at(H), _i64(H.stride(0)), _i64(count), _at(owner), _at(scale), _at(zero), ctypes.c_float(top),
             _at(pull), _at(error), _at(codes), _at(moved), _i64(begin), _i64(end), _at(scratch))

    _share(n, n * count, part)


def rule(bits: int, sym: bool, *, turn: bool, mse: bool, zero_min: int, dtype: torch.dtype, ratios: int, fine: int, refits: int
         ) -> Rule:
    """The arguments of grid.fit as solve.c takes them."""
    return Rule(2**bits - 1, 2 ** (bits - 1), zero_min, sym, turn, mse, _DTYPES[dtype], ratios, fine, refits)


def _share(n: int, work: int, part: Callable[[int, int], None]) -> None:
    """part(begin, end) over the rows 0..n, on threads of equal shares."""
    threads = max(1, min(torch.get_num_threads(), work // _WORK_OF_A_THREAD, n // 32))
    if threads == 1:
        return part(0, n)
    cuts = [n * i // threads // 32 * 32 for i in range(threads)] + [n]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, cuts, cuts[1:]))


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_i64 = ctypes.c_int64
