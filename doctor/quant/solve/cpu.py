"""The native loops of cpu/solve.c: the grid search, GPTQ's loop over columns and its refinement, on CPU tensors in
float32.

grid_search.py and gptq.py call these first and fall back to torch where there is no library, or another device.
Rows are shared among as many threads as torch has; a row's result does not depend on how they are shared.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise

import torch

from doctor.core.messages import _
from doctor.formats.grid import Grid
from doctor.quant.solve.float_scale import FloatScale
from doctor.quant.solve.numerics import tiles_of
from doctor.quant.solving_budget import PACKED_BYTES
from doctor.scan import native

ScaleKind = torch.dtype | FloatScale
Forget = Callable[[], None]

BLOCK, _PANEL = 128, 4  # columns of a block and of a panel, BLOCK and COLUMNS of solve.c
_WORK_OF_A_THREAD = 1 << 16  # weights below which a second thread costs more than it brings
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLOATS, _POWERS = 3, 4  # scales of 4-bit floats: 8-bit floats under a divisor, powers of two


class NativeGridParams(ctypes.Structure):
    """struct grid_rule of solve.c."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("top", "half", "zero_min")),
        *((name, ctypes.c_int32) for name in ("sym", "turn", "mse", "dtype", "ratios", "fine", "refits")),
        ("divisor", ctypes.c_float),
    ]


def note(device: torch.device | str) -> str:
    """One line for a run's notes where torch does the work of the native loops; empty where they run, or where the
    device is no CPU.
    """
    if torch.device(device).type != "cpu" or native.level():
        return ""
    return _(
        "the native library is absent or turned off: grid searches and column loops run in torch, which gives the "
        "same quality and takes two to four times as long a linear"
    )


def native_loops() -> bool:
    """Whether the native library is there and in use."""
    return native.level() is not None


def usable(*tensors: torch.Tensor) -> bool:
    """Whether the native loops can take these tensors."""
    return native_loops() and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def fit(
    W: torch.Tensor, cost: torch.Tensor | None, width: int, params: NativeGridParams, candidates: torch.Tensor
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
        call(
            _at(W),
            _at(cost),
            _i64(k),
            _i64(width),
            _i64(begin),
            _i64(end),
            ctypes.byref(params),
            _at(candidates),
            _at(scale),
            _at(zero),
            _at(scratch),
        )

    _share(n, n * k, part)
    return scale, zero


def round_columns(
    W: torch.Tensor,
    S: torch.Tensor,
    order: torch.Tensor,
    owner: torch.Tensor,
    extra: torch.Tensor,
    params: NativeGridParams,
    grid: Grid | None,
    cost: torch.Tensor | None = None,
    width: int = 0,
    candidates: torch.Tensor | None = None,
    forget: Forget | None = None,
) -> tuple[torch.Tensor, ...]:
    """GPTQ of W f32[n, k], step p rounding column order[p] to the grid of group owner[p]: (codes u8[n, k], scale f32[n,
    G],

    zero i32[n, G], loss f64[n], excess f64[n]). The lower triangle of S f32[k, k] is the factor of H in that order
    reversed (square.py); loss is tr(e H e^T) of the damped H by row, excess what the damping extra f32[k] of each step
    has in it. grid (scale, zero) fixed beforehand, or None: then groups are runs of `width` steps, a multiple of 4 up
    to 128, fitted when their first step comes up, with cost f32[k] by step. A scale past the stored dtype comes out as
    Inf. forget: of an S in a file, called when some of its rows were read.
    """
    n, k = W.shape
    fitted = grid is None
    block = width * (BLOCK // width) if fitted else BLOCK
    pack = native.function("doctor_pack_factor")

    def packed(first: int, last: int, out: torch.Tensor) -> None:
        for rows in [slice(0, last)] if forget is None else tiles_of(last):
            pack(_at(S), *map(_i64, (k, block, first, last, rows.start, rows.stop)), _at(out))
            if forget is not None:
                forget()

    groups = grid.scale.shape[1] if grid else k // width
    grid = grid or Grid(torch.empty(n, groups), torch.empty(n, groups, dtype=torch.int32))
    scale, zero = grid.scale, grid.zero
    codes = torch.empty(n, k, dtype=torch.uint8)
    sums = _run(
        "doctor_round_columns",
        W,
        order,
        owner,
        packed,
        lambda end: end,
        extra,
        scale,
        zero,
        codes,
        params,
        block,
        width if fitted else 0,
        cost,
        candidates,
    )
    return codes, scale, zero, *sums


def refine(
    W: torch.Tensor,
    S: torch.Tensor,
    diagonal: torch.Tensor,
    order: torch.Tensor,
    owner: torch.Tensor,
    extra: torch.Tensor,
    params: NativeGridParams,
    codes: torch.Tensor,
    grid: Grid,
    width: int = 0,
    forget: Forget | None = None,
) -> tuple[torch.Tensor, ...]:
    """One pass of coordinate descent under H + diag(extra): (codes, scale, zero, change of the loss f64[n], excess
    f64[n]).

    H lies above the diagonal of S f32[k, k], its own diagonal f32[k] apart; the rest of S is not read, but with
    `forget`, which is called when a part of an S in a file was read: then S is symmetric. width: of the groups, runs in
    `order`, whose scale is fitted again after its codes (a multiple of 4 up to 128); 0 leaves scales alone.
    """
    k = W.shape[1]
    block = width or BLOCK
    pack = native.function("doctor_pack_hessian")
    diagonal = diagonal.contiguous()

    def packed(first: int, last: int, out: torch.Tensor) -> None:
        sizes = map(_i64, (k, forget is not None, block, first, last))
        pack(_at(S), _at(diagonal), _at(order), _at(extra), *sizes, _at(out))
        if forget is not None:
            forget()

    codes, scale, zero = codes.clone(), grid.scale.clone(), grid.zero.contiguous()
    sums = _run(
        "doctor_refine", W, order, owner, packed, lambda end: k, extra, scale, zero, codes, params, block, width
    )
    return codes, scale, zero, *sums


def arrange(S: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor, out: torch.Tensor, rows: slice) -> None:
    """H with rows and columns in order i32[k] into some rows of the lower triangle of `out` f32[k, k], diagonal
    included.

    H lies above the diagonal of S f32[k, k], its own diagonal f32[k] apart. out: S itself, whose upper triangle stays,
    or another square; then S is symmetric.
    """
    k, first = len(S), rows.start
    call = native.function("doctor_arrange")

    def part(begin: int, end: int) -> None:
        call(_at(S), _at(diagonal), _at(order), _i64(k), _i64(first + begin), _i64(first + end), _at(out))

    _share(rows.stop - first, (rows.stop - first) * rows.stop, part)


def fits(width: int) -> bool:
    """Whether grids of groups of `width` can be fitted between the columns of a block."""
    return width <= BLOCK and width % _PANEL == 0


class _Columns(ctypes.Structure):
    """struct columns_of of solve.c."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "W",
                "order",
                "owner",
                "packed",
                "extra",
                "scale",
                "zero",
                "codes",
                "loss",
                "excess",
                "cost",
                "candidates",
            )
        ),
        *((name, ctypes.c_int64) for name in ("n", "k", "groups", "block", "width", "first", "last")),
    ]


def _spans(k: int, block: int, height: Callable[[int], int]) -> Iterator[tuple[int, int, list[int]]]:
    """(first step, last step, floats of each of its blocks) of what is packed at a time: PACKED_BYTES, one block at
    least. height: rows of the block that ends at a step.
    """
    first, sizes = 0, list[int]()
    for begin in range(0, k, block):
        end = min(k, begin + block)
        size = -(-(end - begin) // _PANEL) * _PANEL * height(end)
        if sizes and 4 * (sum(sizes) + size) > PACKED_BYTES:
            yield first, begin, sizes
            first, sizes = begin, []
        sizes.append(size)
    yield first, k, sizes


def _run(
    name: str,
    W: torch.Tensor,
    order: torch.Tensor,
    owner: torch.Tensor,
    pack: Callable[[int, int, torch.Tensor], None],
    height: Callable[[int], int],
    extra: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    codes: torch.Tensor,
    params: NativeGridParams,
    block: int,
    width: int,
    cost: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, excess) f64[n] of one of the loops. pack: fills the panels of steps [first, last), whole blocks."""
    n, k = W.shape
    groups = scale.shape[1]
    sums = torch.zeros(2, n, dtype=torch.float64)
    call, size = native.function(name), native.function("doctor_columns_scratch", ctypes.c_int64)
    spans = list(_spans(k, block, height))
    packed = torch.empty(max(sum(sizes) for _first, _last, sizes in spans))
    cuts = _cuts(n, n * k)
    kept = len(spans) > 1  # then errors stay in the scratch from span to span
    scratch = [
        torch.empty(size(_i64(k), _i64(groups), _i64(width), _i64((end - begin) if kept else 0)))
        for begin, end in pairwise(cuts)
    ]
    for first, last, sizes in spans:
        ends = [0, *accumulate(sizes)]

        def fill(begin: int, end: int, first: int = first, last: int = last, ends: list[int] = ends) -> None:
            pack(first + begin * block, min(last, first + end * block), packed[ends[begin] :])

        _share(len(sizes), 4 * sum(sizes), fill, least=1)
        tensors = (W, order, owner, packed, extra, scale, zero, codes, sums[0], sums[1], cost, candidates)
        columns = _Columns(*(_at(t) for t in tensors), n, k, groups, block, width, first, last)

        def part(begin: int, end: int, columns: _Columns = columns) -> None:
            own = scratch[cuts.index(begin)]
            call(ctypes.byref(columns), ctypes.byref(params), _i64(begin), _i64(end), _at(own))

        _on_threads(part, cuts)
    return sums[0], sums[1]


def native_grid_params(
    top: int,
    middle: int,
    sym: bool,
    *,
    turn: bool,
    mse: bool,
    zero_min: int,
    dtype: ScaleKind,
    ratios: int,
    fine: int,
    refits: int,
) -> NativeGridParams:
    """The arguments of grid.fit as solve.c takes them."""
    kind = (_POWERS if dtype.power else _FLOATS) if isinstance(dtype, FloatScale) else _DTYPES[dtype]
    divisor = dtype.divisor if isinstance(dtype, FloatScale) else 1.0
    return NativeGridParams(top, middle, zero_min, sym, turn, mse, kind, ratios, fine, refits, divisor)


def _share(n: int, work: int, part: Callable[[int, int], None], least: int = 32) -> None:
    """part(begin, end) over the rows 0..n, on threads of equal shares."""
    _on_threads(part, _cuts(n, work, least))


def _cuts(n: int, work: int, least: int = 32) -> list[int]:
    """Where the shares of 0..n begin, multiples of `least`, and n."""
    threads = max(1, min(torch.get_num_threads(), work // _WORK_OF_A_THREAD, n // least))
    return [n * i // threads // least * least for i in range(threads)] + [n]


def _on_threads(part: Callable[[int, int], None], cuts: list[int]) -> None:
    if len(cuts) == 2:
        return part(*cuts)
    with ThreadPoolExecutor(len(cuts) - 1) as pool:
        list(pool.map(part, cuts, cuts[1:]))


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_i64 = ctypes.c_int64
