"""Block types of GGUF files: GPTQ's loop with a block's grid fitted when its first column comes up, and its refinement.

Columns are rounded in the order in which they are stored: an act-order would have to fix all grids beforehand, and a
block's grid is worth more when it is fitted on weights that carry every correction so far. With the damped H = M M^T, M
upper triangular, column j is rounded at w_j + sum_i<j E_i M_ij / M_jj, E = W - Q. Products over panels of up to 256
columns are torch's; what happens inside a panel is cpu/gguf.c's. The scales that a K type's blocks share are snapped to
float16 first, the 6-bit factors to them next, and codes are computed against what is then stored.

Without a Hessian the bytes are those of ggml_quantize_chunk, with the same importance or without any.

Sources: as in gptq.py; ggml-org/llama.cpp ggml/src/ggml-quants.c.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from doctor.checkpoint.ggml_types import GgmlType
from doctor.core.errors import MachineError, NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import DAMP, DAMP_MAX
from doctor.quant.solve.factor import Attempt
from doctor.quant.solve.grid import require_finite
from doctor.quant.solve.losses import SAMPLE, energies, share_of
from doctor.quant.solve.numerics import exact_products, live_mean, row_chunks
from doctor.quant.solve.rtn import require_hessian
from doctor.quant.solve.square import Square
from doctor.quant.solving_budget import CHUNK_BYTES
from doctor.scan import native

PANEL = 256  # columns of a panel, WIDEST of gguf.c
FITTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # KINDS of gguf.c
_PLAIN, _WEIGHED = 0, 1
_HEAD = np.dtype([("d", "<f4"), ("m", "<f4"), ("scale", "i1", 16), ("low", "u1", 16)])  # struct head


@dataclass(frozen=True)
class BlockSolution:
    """One quantized linear as blocks. Losses as in solution.Solution.

    words u8[n, bytes of a row]; values f32[n, k]: what a reader of them computes.
    """

    kind: GgmlType
    words: torch.Tensor
    values: torch.Tensor
    outcome: str
    loss: float
    rtn_loss: float
    attempts: tuple[Attempt, ...]

    def weight(self) -> torch.Tensor:
        """f32[n, k]: what a reader of the words computes."""
        return self.values


class _Blocks:
    """Heads and codes of a matrix, and the calls of gguf.c on them."""

    def __init__(self, kind: GgmlType, n: int, width: int):
        self.kind, self.n, self.width = kind, n, width
        self.heads = np.zeros((n, width // kind.block), _HEAD)
        self.codes = torch.zeros(n, width, dtype=torch.uint8)

    def values(self) -> torch.Tensor:
        """f32[n, width]: what a reader computes."""
        out = torch.empty(self.n, self.width)
        self._call("doctor_ggml_values", self._heads(), _at(self.codes), _i64(self.width), out=out)
        return out

    def fit(self, W: torch.Tensor, importance: torch.Tensor | None) -> None:
        """Without feedback. importance f32[width], None for ggml's own choice of weights."""
        call = _function("doctor_ggml_fit")
        mode = _PLAIN if importance is None else _WEIGHED

        def part(begin: int, end: int) -> None:
            call(
                ctypes.c_int32(self.kind.number),
                ctypes.c_int32(mode),
                _at(W),
                _at(importance),
                _i64(self.width),
                _i64(begin),
                _i64(end),
                self._heads(),
                _at(self.codes),
            )

        _share(self.n, part)

    def words(self) -> torch.Tensor:
        """u8[n, bytes of a row]."""
        out = torch.empty(self.n, self.width // self.kind.block * self.kind.nbytes, dtype=torch.uint8)
        self._call("doctor_ggml_pack", self._heads(), _at(self.codes), _i64(self.width), out=out)
        return out

    def _call(self, name: str, *arguments: ctypes._SimpleCData, out: torch.Tensor) -> None:
        call = _function(name)
        _share(
            self.n,
            lambda begin, end: call(ctypes.c_int32(self.kind.number), *arguments, _i64(begin), _i64(end), _at(out)),
        )

    def _heads(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.heads.ctypes.data)

    def panel(self, begin: int, end: int) -> _Blocks:
        """A copy of the columns [begin, end)."""
        found = _Blocks(self.kind, self.n, end - begin)
        found.heads[:] = self.heads[:, begin // self.kind.block : end // self.kind.block]
        found.codes[:] = self.codes[:, begin:end]
        return found

    def put(self, begin: int, part: _Blocks) -> None:
        """Those columns back."""
        first = begin // self.kind.block
        self.heads[:, first : first + part.heads.shape[1]] = part.heads
        self.codes[:, begin : begin + part.width] = part.codes


class _Panel(ctypes.Structure):
    """struct panel of gguf.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("W", "T", "square", "cost", "Q", "heads", "codes")),
        ("width", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


def usable() -> bool:
    """Whether the native library, which these types need, is there."""
    return native.level() is not None


def round_blocks(W: torch.Tensor, kind: GgmlType, importance: torch.Tensor | None = None) -> torch.Tensor:
    """u8[n, bytes of a row]: W f32[n, k] as ggml_quantize_chunk packs it, with importance f32[k] >= 0 of the columns or
    without.
    """
    blocks = _Blocks(kind, *W.shape)
    blocks.fit(W.to(torch.float32).contiguous(), None if importance is None else importance.to(torch.float32))
    return blocks.words()


def rounded_values(W: torch.Tensor, kind: GgmlType, importance: torch.Tensor) -> torch.Tensor:
    """f32[n, k]: what a reader computes of W f32[n, k] rounded without feedback, columns weighed by f32[k] >= 0."""
    blocks = _Blocks(kind, *W.shape)
    blocks.fit(W.to("cpu", torch.float32).contiguous(), importance.to("cpu", torch.float32).contiguous())
    return blocks.values().to(W.device)


def solve(
    W: torch.Tensor,
    H: torch.Tensor | Square | None,
    kind: GgmlType,
    *,
    refine: int = 2,
    damp: float = DAMP,
    damp_max: float = DAMP_MAX,
) -> BlockSolution:
    """W[n, k] as blocks, under H[k, k] = 2/n X^T X or, where it is None, rounded without feedback.

    Where no factor of H exists up to damp_max, the result is rounding with diag(H) as importance, outcome "rtn".
    refine: passes of coordinate descent. Computed on the processor, wherever W is. Raises NotQuantizable for non-finite
    W or H, and for scales past float16.
    """
    require_finite(W)
    W = W.to("cpu", torch.float32).contiguous()
    blocks = _Blocks(kind, *W.shape)
    if H is None:
        blocks.fit(W, None)
        Q = _checked(blocks)
        loss = share_of((W - Q).double().square().sum(), W.double().square().sum())
        return BlockSolution(blocks.kind, blocks.words(), Q, "rtn", loss, loss, ())
    require_hessian(W, H)
    square = H if isinstance(H, Square) and H.device.type == "cpu" else Square.of(_matrix(H).cpu())
    with exact_products():
        return _with_feedback(W, square, blocks, refine, damp, damp_max)


def _matrix(H: torch.Tensor | Square) -> torch.Tensor:
    return H.matrix() if isinstance(H, Square) else H


def _with_feedback(
    W: torch.Tensor, H: Square, blocks: _Blocks, refine: int, damp: float, damp_max: float
) -> BlockSolution:
    mean = live_mean(H)
    attempts = H.factorise(damp, damp_max, mean)
    importance = torch.where(H.diagonal() > 0, H.diagonal(), mean).contiguous()
    if not H.factored or mean == 0:
        blocks.fit(W, importance if mean > 0 else None)
        Q = _checked(blocks)
        loss = _loss(W, Q, H, mean)
        return BlockSolution(blocks.kind, blocks.words(), Q, "rtn", loss, loss, tuple(attempts))
    Q = torch.zeros_like(W)
    _round(W, H, blocks, Q)
    extra = torch.where(H.diagonal() > 0, 0.0, mean) + attempts[-1].damp * mean
    for _pass in range(refine):
        _refine(W, H, extra, blocks, Q)
    Q = _checked(blocks)
    loss = _loss(W, Q, H, mean)
    rounded = _rounding_loss(W, Q, H, blocks.kind, importance, loss)
    return BlockSolution(blocks.kind, blocks.words(), Q, "gptq", loss, rounded, tuple(attempts))


def _round(W: torch.Tensor, H: Square, blocks: _Blocks, Q: torch.Tensor) -> None:
    """GPTQ's loop under the factor M of H, unit upper triangular once its columns are divided by the pivots. Q f32[n,
    k] gets what a reader computes.
    """
    pivots = H.pivots()
    for begin, end in _panels(blocks):
        M = H.factor_panel(begin, end) / pivots[begin:end]
        T = W[:, begin:end].clone()
        for rows in row_chunks(W.shape, CHUNK_BYTES):
            if begin:
                T[rows].addmm_(W[rows, :begin] - Q[rows, :begin], M[:begin])
        part = blocks.panel(begin, end)
        found = torch.empty(len(W), end - begin)
        _run(
            "doctor_ggml_round",
            part,
            W[:, begin:end].contiguous(),
            T,
            M[begin:].contiguous(),
            pivots[begin:end].square(),
            found,
        )
        Q[:, begin:end] = found
        blocks.put(begin, part)


def _refine(W: torch.Tensor, H: Square, extra: torch.Tensor, blocks: _Blocks, Q: torch.Tensor) -> None:
    """One pass of coordinate descent over codes and scales under H + diag(extra), extra f32[k]."""
    for begin, end in _panels(blocks):
        part = blocks.panel(begin, end)
        found = Q[:, begin:end].contiguous()
        columns = H.columns(begin, end)
        columns[begin:end].diagonal().add_(extra[begin:end])
        pull = torch.empty_like(found)
        for rows in row_chunks(W.shape, CHUNK_BYTES):
            torch.mm(W[rows] - Q[rows], columns, out=pull[rows])
        _run("doctor_ggml_refine", part, None, pull, columns[begin:end].contiguous(), None, found)
        Q[:, begin:end] = found
        blocks.put(begin, part)


def _panels(blocks: _Blocks) -> list[tuple[int, int]]:
    return [(begin, min(blocks.width, begin + PANEL)) for begin in range(0, blocks.width, PANEL)]


def _run(
    name: str,
    part: _Blocks,
    W: torch.Tensor | None,
    T: torch.Tensor,
    square: torch.Tensor,
    cost: torch.Tensor | None,
    Q: torch.Tensor,
) -> None:
    call = _function(name)
    panel = _Panel(*map(_at, (W, T, square, cost, Q)), part._heads(), _at(part.codes), part.width, part.kind.number)
    _share(part.n, lambda begin, end: call(ctypes.byref(panel), _i64(begin), _i64(end)))


def _checked(blocks: _Blocks) -> torch.Tensor:
    """What a reader computes of the blocks. Raises NotQuantizable where a scale is past float16."""
    Q = blocks.values()
    if not torch.isfinite(Q).all():
        row = int((~torch.isfinite(Q)).any(1).to(torch.uint8).argmax())
        raise NotQuantizable(
            _(
                "row {row} needs a scale past 65504, where float16 ends: {type} would store it as Inf.",
                row=row,
                type=blocks.kind.name,
            ),
            _("Run `doctor check` for the tensor's outliers, or keep this linear in 16 bits."),
        )
    return Q


def _loss(W: torch.Tensor, Q: torch.Tensor, H: Square, mean: float) -> float:
    if mean == 0:
        return math.nan
    return share_of(energies(W - Q, H).sum(), energies(W, H).sum())


def _rounding_loss(
    W: torch.Tensor, Q: torch.Tensor, H: Square, kind: GgmlType, importance: torch.Tensor, loss: float
) -> float:
    """The loss of the same type without feedback, from up to SAMPLE rows, which ours on them scales to all."""
    rows = torch.arange(len(W)) if len(W) <= SAMPLE else torch.arange(SAMPLE) * len(W) // SAMPLE
    part = W[rows].contiguous()
    plain = _Blocks(kind, *part.shape)
    plain.fit(part, importance)
    rounded, ours = (energies(part - other, H).sum() for other in (plain.values(), Q[rows]))
    return float(rounded / ours * loss) if ours > 0 else share_of(rounded, energies(part, H).sum())


def _function(name: str) -> Callable:
    found = native.function(name)
    if found is None:
        raise MachineError(
            _("the native library is absent or turned off: types of GGUF are computed in it."),
            _("Reinstall the package where gcc or clang is, or unset DOCTOR_NATIVE."),
        )
    return found


def _share(n: int, part: Callable[[int, int], None]) -> None:
    """part(begin, end) over the rows 0..n, on as many threads as torch has."""
    threads = max(1, min(torch.get_num_threads(), n // 32))
    if threads == 1:
        return part(0, n)
    cuts = [n * i // threads for i in range(threads)] + [n]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, cuts, cuts[1:]))


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_i64 = ctypes.c_int64
