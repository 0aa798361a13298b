"""Tensors that an edit makes of more than their own codes: taken from another checkpoint, unpacked, merged, grown.

A Made tensor is read by leading rows like a stored one, so the view streams it and nothing is worked out twice. NumPy
alone: a fix of a quantized checkpoint needs no torch. The packed formats are those of quant/pack.py, whose results the
tests compare.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from doctor.checkpoint.codecs import from_codes, nonfinite_mask, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import CODE_NUMPY, DTYPES
from doctor.checkpoint.safetensors import TensorInfo, new_digest
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.edits.kinds import (
    CASTS,
    MADE,
    AddLowRank,
    Dequantize,
    Edit,
    EqualZeros,
    GroupsInOrder,
    GrowRows,
    TakeTensor,
)
from doctor.formats import tensor_names

AWQ_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)  # which 4-bit field of a word holds column 0, 1, … of its eight
MEAN_SLAB = 1 << 22  # values summed at once
STALE = "The edits were made for another state of the files: run `doctor fix` again."


class Stored:
    """A tensor as it lies in a checkpoint. `info` says what rows(begin, end) gives: codes of leading rows."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        if name not in checkpoint.tensors:
            raise PlanRefused(f"{name}: {checkpoint.root} has no such tensor.", STALE)
        self.checkpoint, self.info = checkpoint, checkpoint.tensors[name]
        if self.info.dtype.name not in CODE_NUMPY:
            raise PlanRefused(f"{name}: dtype {self.info.dtype.name} has no whole-byte elements and cannot be edited.")

    def rows(self, begin: int, end: int) -> np.ndarray:
        shape = self.info.shape or (1,)
        codes = np.empty((end - begin, *shape[1:]), CODE_NUMPY[self.info.dtype.name])
        row = self.info.nbytes // max(shape[0], 1)
        with self.checkpoint.open_file(self.info.shard) as file:
            file.read_into(self.info.begin + begin * row, codes.reshape(-1).view(np.uint8).data)
        return codes


class Taken(Stored):
    """A tensor of another checkpoint, whose bytes must be those that the edit was made for."""

    def __init__(self, edit: TakeTensor):
        super().__init__(opened(edit.root), edit.called or edit.tensor)
        self.edit, self.known = edit, False

    def rows(self, begin: int, end: int) -> np.ndarray:
        if not self.known:
            found = digest(self.checkpoint, self.info)
            if found != self.edit.digest:
                raise PlanRefused(
                    f"{self.edit.root}: {self.info.name} has blake2b {found}; the edit was made for {self.edit.digest}.",
                    STALE,
                )
            self.known = True
        return super().rows(begin, end)


class Grown:
    """Another tensor with rows at its end that are the mean of its finite values, column by column."""

    def __init__(self, inner, edit: GrowRows):
        shape = inner.info.shape
        if inner.info.dtype.name not in CASTS or not shape or edit.size < shape[0]:
            raise PlanRefused(
                f"{edit.tensor}: {inner.info.dtype.name} {list(shape)} cannot grow to {edit.size} rows.", STALE
            )
        self.inner, self.info, self.mean = inner, _sized(inner.info, (edit.size, *shape[1:])), None

    def rows(self, begin: int, end: int) -> np.ndarray:
        old = self.inner.info.shape[0]
        parts = [self.inner.rows(begin, min(end, old))] if begin < old else []
        if end > old:
            if self.mean is None:
                self.mean = self._mean()
            parts.append(np.repeat(self.mean[None], end - max(begin, old), 0))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _mean(self) -> np.ndarray:
        info = self.inner.info
        step = max(MEAN_SLAB // max(info.numel // info.shape[0], 1), 1)
        total, count = np.zeros(info.shape[1:]), np.zeros(info.shape[1:])
        for row in range(0, info.shape[0], step):
            values = from_codes(self.inner.rows(row, min(row + step, info.shape[0])), info.dtype.name)
            finite = np.isfinite(values)
            total += np.where(finite, values, 0).sum(0, dtype=np.float64)
            count += finite.sum(0)
        return to_codes((total / np.maximum(count, 1)).astype(np.float32), info.dtype.name)


class Merged:
    """A weight with a low-rank change added to it; with DoRA's magnitudes, each output's row of the sum is brought to
    its own.

    PEFT works the norms out in the type of the sum, which is float32 here; they are summed in float64, whose rounding
    does not hang on the order.
    """

    def __init__(self, inner, edit: AddLowRank):
        adapter = opened(edit.root)
        self.inner, self.info, self.edit = inner, inner.info, edit
        self.a, self.b = (_values(adapter, name, 2) for name in (edit.a, edit.b))
        product = (self.b.shape[0], self.a.shape[1])
        want = product[::-1] if edit.transposed else product
        if self.a.shape[0] != self.b.shape[1] or want != self.info.shape or self.info.dtype.name not in CASTS:
            raise PlanRefused(
                f"{edit.tensor}: {self.info.dtype.name} {list(self.info.shape)}; B {list(self.b.shape)} times A {list(self.a.shape)} "
                "cannot be added to it.",
                "Give the base model that the adapter was trained on.",
            )
        self.magnitude = _values(adapter, edit.magnitude, 1) if edit.magnitude else None
        if self.magnitude is not None and len(self.magnitude) != product[0]:
            raise PlanRefused(
                f"{edit.tensor}: {product[0]} outputs; {edit.magnitude} has {len(self.magnitude)}.", STALE
            )
        self.factor: np.ndarray | None = None  # of every output of a transposed weight

    def rows(self, begin: int, end: int) -> np.ndarray:
        total = self._sum(begin, end)
        if self.magnitude is not None and self.edit.transposed:
            if self.factor is None:
                step = max(MEAN_SLAB // max(self.info.shape[1], 1), 1)
                parts = (
                    self._sum(row, min(row + step, self.info.shape[0])) for row in range(0, self.info.shape[0], step)
                )
                self.factor = self._factor(
                    sum(np.square(part, dtype=np.float64).sum(0) for part in parts), self.magnitude
                )
            total = self.factor * total
        elif self.magnitude is not None:
            total = self._factor(np.square(total, dtype=np.float64).sum(1), self.magnitude[begin:end])[:, None] * total
        return to_codes(total, self.info.dtype.name)

    def _sum(self, begin: int, end: int) -> np.ndarray:
        values = from_codes(self.inner.rows(begin, end), self.info.dtype.name)
        change = (self.b @ self.a[:, begin:end]).T if self.edit.transposed else self.b[begin:end] @ self.a
        return values + np.float32(self.edit.scale) * change

    def _factor(self, squares: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        zero = int((squares == 0).sum())
        if zero:
            raise PlanRefused(
                f"{self.edit.tensor}: {zero:,} outputs are all zero after the sum and cannot be brought to a magnitude.",
                "Give the base model that the adapter was trained on.",
            )
        return magnitude / np.sqrt(squares).astype(np.float32)


class Groups:
    """g_idx of groups of neighbours."""

    def __init__(self, edit: GroupsInOrder):
        self.size, self.info = edit.group_size, _made(edit.tensor, "I32", (edit.in_features,))

    def rows(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end, dtype=np.int32) // (self.size if self.size > 0 else self.info.shape[0])


class Zeros:
    """Zero points that are one word throughout."""

    def __init__(self, edit: EqualZeros):
        self.word, self.info = np.uint32(edit.word).view(np.int32), _made(edit.tensor, "I32", tuple(edit.shape))

    def rows(self, begin: int, end: int) -> np.ndarray:
        return np.full((end - begin, self.info.shape[1]), self.word, np.int32)


class Plain:
    """A quantized linear as plain numbers. Its packed tensors are in memory from the first row asked for to the
    last.
    """

    def __init__(self, source: Checkpoint, edit: Dequantize):
        self.source, self.edit, self.info = source, edit, _made(edit.tensor, edit.dtype, edit.shape)
        self.module, self.parts = edit.tensor.removesuffix(".weight"), None

    def rows(self, begin: int, end: int) -> np.ndarray:
        parts = self.parts or {
            name: _part(self.source, f"{self.module}.{name}")
            for name in PARTS[self.edit.method]
            if f"{self.module}.{name}" in self.source.tensors
        }
        self.parts = parts if end < self.edit.shape[0] else None
        try:
            values = _READ[self.edit.method](self.edit, parts, begin, end)
        except KeyError as error:
            raise PlanRefused(f"{self.module}: {error.args[0]} is not there; it cannot be unpacked.", STALE) from None
        if values.shape != (end - begin, self.edit.shape[1]):
            raise PlanRefused(f"{self.module}: unpacks to rows of {values.shape[1]}, not {self.edit.shape[1]}.", STALE)
        return to_codes(values, self.edit.dtype)


PARTS = {**tensor_names.PARTS, "fp8": ("weight", "weight_scale_inv", "weight_scale")}


def made(source: Checkpoint, name: str, edits: list[Edit]):
    """The tensor that these edits make, before those that change codes in place; None where none of them makes
    anything.

    Raises PlanRefused where the files do not hold what an edit needs.
    """
    if not any(isinstance(e, MADE) for e in edits):
        return None
    result = Stored(source, name) if name in source.tensors else None
    for edit in sorted(edits, key=lambda e: e.phase == "shape"):
        if isinstance(edit, TakeTensor):
            result = Taken(edit)
        elif isinstance(edit, Dequantize):
            result = Plain(source, edit)
        elif isinstance(edit, GroupsInOrder):
            result = Groups(edit)
        elif isinstance(edit, EqualZeros):
            result = Zeros(edit)
        elif isinstance(edit, (AddLowRank, GrowRows)):
            if result is None:
                raise PlanRefused(f"{name}: the checkpoint has no such tensor.", STALE)
            result = (Merged if isinstance(edit, AddLowRank) else Grown)(result, edit)
    return result


_REMOTE: dict[str, Checkpoint] = {}


def opened(root: str) -> Checkpoint:
    """Another checkpoint by its edits' `root`, opened once in a run: a directory, or what `lend` was told of."""
    return _REMOTE[root] if root in _REMOTE else _opened(root)


@contextmanager
def lend(root: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Inside it `opened(root)` is this checkpoint, which is no directory of this machine."""
    _REMOTE[root] = checkpoint
    try:
        yield
    finally:
        del _REMOTE[root]


@cache
def _opened(root: str) -> Checkpoint:
    return Checkpoint.open(root)


def digest(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """blake2b, 16 bytes in hexadecimal, of a tensor's bytes."""
    result = new_digest()
    with checkpoint.open_file(info.shard) as file:
        for part in checkpoint.chunks(file, info, 1 << 20):
            result.update(part)
    return result.hexdigest()


# packed formats


def unpack_columns(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """codes u8[count, c]: each column of words i32[h, c] is a little-endian bit stream."""
    height, columns = words.shape
    blocks = -(-count // 32)
    padded = np.zeros((blocks * bits, columns), np.uint32)
    kept = min(height, blocks * bits)
    padded[:kept] = words[:kept].view(np.uint32)
    words, codes = padded.reshape(blocks, bits, columns), np.empty((blocks, 32, columns), np.uint8)
    for code in range(32):
        word, shift = divmod(code * bits, 32)
        field = words[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            field = field | words[:, word + 1] << np.uint32(32 - shift)
        codes[:, code] = field & np.uint32((1 << bits) - 1)
    return codes.reshape(blocks * 32, columns)[:count]


def _unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    return unpack_columns(np.ascontiguousarray(words.T), bits, count).T


def _gptq(edit: Dequantize, parts: dict, begin: int, end: int) -> np.ndarray:
    n, k = edit.shape
    codes = unpack_columns(np.ascontiguousarray(parts["qweight"][:, begin:end]), edit.bits, k).T
    zeros = _unpack_rows(parts["qzeros"], edit.bits, n)[:, begin:end].astype(np.float32) + (edit.version == 1)
    scales = parts["scales"][:, begin:end]
    group = _group_index(parts.get("g_idx"), k, len(scales), edit.tensor)
    return scales.T[:, group] * (codes - zeros.T[:, group])


def _awq(edit: Dequantize, parts: dict, begin: int, end: int) -> np.ndarray:
    first, last = begin // 8, -(-end // 8)
    codes, zeros = (_awq_fields(parts[name][:, first:last]) for name in ("qweight", "qzeros"))
    scales, inside = parts["scales"][:, begin:end], slice(begin - first * 8, end - first * 8)
    group = _group_index(None, edit.shape[1], len(scales), edit.tensor)
    return (scales[group] * (codes[:, inside] - zeros[group][:, inside].astype(np.float32))).T


def _awq_fields(words: np.ndarray) -> np.ndarray:
    shifts = np.array(AWQ_FIELD, np.uint32) * np.uint32(4)
    return (
        ((np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts) & np.uint32(15))
        .reshape(len(words), -1)
        .astype(np.uint8)
    )


def _compressed(edit: Dequantize, parts: dict, begin: int, end: int) -> np.ndarray:
    (n, k), bits = edit.shape, edit.bits
    words, scales = parts["weight_packed"][begin:end], parts["weight_scale"][begin:end]
    if words.shape[1] == -(-k * bits // 32):
        codes = _unpack_rows(words, bits, k)
    else:  # before compressed-tensors 0.18 no code crossed a word
        shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        fields = (np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        codes = fields.reshape(len(words), -1)[:, :k]
    zero = np.float32(1 << (bits - 1))
    if "weight_zero_point" in parts:
        zero = unpack_columns(parts["weight_zero_point"], bits, n)[begin:end].astype(np.float32)
    group = _group_index(parts.get("weight_g_idx"), k, scales.shape[1], edit.tensor)
    return scales[:, group] * (codes - (zero if zero.ndim == 0 else zero[:, group]))


def _fp8(edit: Dequantize, parts: dict, begin: int, end: int) -> np.ndarray:
    n, k = edit.shape
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    values = parts["weight"][begin:end]
    if scale.size == 1:
        return values * scale.reshape(())
    scale = scale.reshape(len(scale), -1)
    rows, columns = edit.block or (-(-n // scale.shape[0]), -(-k // scale.shape[1]))
    if scale.shape != (-(-n // rows), -(-k // columns)):
        raise PlanRefused(
            f"{edit.tensor}: scales {list(scale.shape)}; blocks of {rows} × {columns} of {[n, k]} make "
            f"{[-(-n // rows), -(-k // columns)]}.",
            STALE,
        )
    return values * scale[np.arange(begin, end)[:, None] // rows, np.arange(k)[None, :] // columns]


_READ = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}


def _group_index(stored: np.ndarray | None, k: int, groups: int, name: str) -> np.ndarray:
    if stored is None:
        if not groups or k % groups:
            raise PlanRefused(
                f"{name}: {groups} groups of scales for {k} in_features; groups must divide in_features.", STALE
            )
        return np.arange(k) // (k // groups)
    if len(stored) != k or stored.min() < 0 or stored.max() >= groups:
        raise PlanRefused(
            f"{name}: g_idx has {len(stored)} entries from {stored.min()} to {stored.max()}; there are {k} columns and {groups} groups.",
            STALE,
        )
    return stored


def _part(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A packed tensor: words as they are, scales and 8-bit floats as float32 values."""
    codes, kind = checkpoint.load(name), checkpoint.tensors[name].dtype
    if kind.name == "F8_E8M0":
        return np.where(codes == 0xFF, np.float32(np.nan), np.exp2(codes.astype(np.float32) - 127)).astype(np.float32)
    if kind.name == "F8_E4M3":
        return _E4M3[codes]
    if not kind.is_float:
        return codes
    if kind.name not in (*CASTS, "F64"):
        raise BadCheckpoint(f"{name}: {kind.name} is not read as values here.")
    return from_codes(codes, kind.name).astype(np.float32)


def _e4m3_values() -> np.ndarray:
    """f32[256]: value of each E4M3 code, bias 7, no infinities, NaN at 0x7F and 0xFF."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * np.exp2(exponent - 7.0))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


_E4M3 = _e4m3_values()


def _values(checkpoint: Checkpoint, name: str, axes: int) -> np.ndarray:
    """f32 values of an adapter's tensor; PlanRefused where it has other axes or is not finite."""
    info = Stored(checkpoint, name).info
    if info.dtype.name not in CASTS or len(info.shape) != axes:
        raise PlanRefused(
            f"{name}: {info.dtype.name} {list(info.shape)}; {'a low-rank matrix has two axes' if axes == 2 else 'magnitudes have one axis'} "
            "and floating values."
        )
    codes = checkpoint.load(name)
    wrong = int(nonfinite_mask(codes, info.dtype.name).sum())
    if wrong:
        raise PlanRefused(
            f"{name}: {wrong:,} values are not finite; merged, they would spread over whole rows.",
            "Train or fetch the adapter again.",
        )
    return from_codes(codes, info.dtype.name)


def _made(name: str, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    return _sized(TensorInfo(name, DTYPES[dtype], (), "", 0, 0), tuple(shape))


def _sized(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return info._replace(shape=shape, end=info.begin + info.dtype.nbytes(int(np.prod(shape, dtype=np.int64))))
