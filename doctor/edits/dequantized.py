"""Packed weights as float values, in NumPy. The layouts are those of quant/pack.py, whose results the tests compare."""

import numpy as np

from doctor.checkpoint.codecs import from_codes, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.edits.arithmetic import CASTS, new_info
from doctor.edits.kinds import Dequantize
from doctor.edits.stale import stale
from doctor.formats import tensor_names

PARTS = {**tensor_names.PARTS, "fp8": ("weight", "weight_scale_inv", "weight_scale")}
AWQ_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)  # which 4-bit field of a word holds column 0, 1, … of its eight


class DequantizedTensor:
    """A quantized linear as float values. Its packed tensors stay in memory from the first row read to the last."""

    def __init__(self, source: Checkpoint, edit: Dequantize):
        self.source, self.edit, self.info = source, edit, new_info(edit.tensor, edit.dtype, edit.shape)
        self.module = edit.tensor.removesuffix(".weight")
        self.parts: dict[str, np.ndarray] | None = None

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
            raise stale(
                _("{module}: {part} is absent, so it cannot be dequantized.", module=self.module, part=error.args[0])
            ) from None
        if values.shape != (end - begin, self.edit.shape[1]):
            raise stale(
                _(
                    "{module}: dequantizes to rows of {found}; must be {expected}.",
                    module=self.module,
                    found=values.shape[1],
                    expected=self.edit.shape[1],
                )
            )
        return to_codes(values, self.edit.dtype)


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


def _gptq(edit: Dequantize, parts: dict[str, np.ndarray], begin: int, end: int) -> np.ndarray:
    n, k = edit.shape
    codes = unpack_columns(np.ascontiguousarray(parts["qweight"][:, begin:end]), edit.bits, k).T
    zeros = _unpack_rows(parts["qzeros"], edit.bits, n)[:, begin:end].astype(np.float32) + (edit.version == 1)
    scales = parts["scales"][:, begin:end]
    group = _group_index(parts.get("g_idx"), k, len(scales), edit.tensor)
    return scales.T[:, group] * (codes - zeros.T[:, group])


def _awq(edit: Dequantize, parts: dict[str, np.ndarray], begin: int, end: int) -> np.ndarray:
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


def _compressed(edit: Dequantize, parts: dict[str, np.ndarray], begin: int, end: int) -> np.ndarray:
    (n, k), bits = edit.shape, edit.bits
    words, scales = parts["weight_packed"][begin:end], parts["weight_scale"][begin:end]
    if words.shape[1] == -(-k * bits // 32):
        codes = _unpack_rows(words, bits, k)
    else:  # before compressed-tensors 0.18 no code crossed a word
        shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        fields = (np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
        codes = fields.reshape(len(words), -1)[:, :k]
    group = _group_index(parts.get("weight_g_idx"), k, scales.shape[1], edit.tensor)
    if "weight_zero_point" not in parts:
        return scales[:, group] * (codes - np.float32(1 << (bits - 1)))
    zero = unpack_columns(parts["weight_zero_point"], bits, n)[begin:end].astype(np.float32)
    return scales[:, group] * (codes - zero[:, group])


def _fp8(edit: Dequantize, parts: dict[str, np.ndarray], begin: int, end: int) -> np.ndarray:
    n, k = edit.shape
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    values = parts["weight"][begin:end]
    if scale.size == 1:
        return values * scale.reshape(())
    scale = scale.reshape(len(scale), -1)
    rows, columns = edit.block or (-(-n // scale.shape[0]), -(-k // scale.shape[1]))
    if scale.shape != (-(-n // rows), -(-k // columns)):
        raise stale(
            _(
                "{tensor}: scales {found}; blocks of {rows} × {columns} of {shape} need {expected}.",
                tensor=edit.tensor,
                found=list(scale.shape),
                rows=rows,
                columns=columns,
                shape=[n, k],
                expected=[-(-n // rows), -(-k // columns)],
            )
        )
    return values * scale[np.arange(begin, end)[:, None] // rows, np.arange(k)[None, :] // columns]


_READ = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}


def _group_index(stored: np.ndarray | None, k: int, groups: int, name: str) -> np.ndarray:
    if stored is None:
        if not groups or k % groups:
            raise stale(
                _(
                    "{tensor}: {groups} groups of scales for {width} in_features; groups must divide in_features.",
                    tensor=name,
                    groups=groups,
                    width=k,
                )
            )
        return np.arange(k) // (k // groups)
    if len(stored) != k or stored.min() < 0 or stored.max() >= groups:
        raise stale(
            _(
                "{tensor}: g_idx has {count} entries from {low} to {high}; must be {width} columns of {groups} groups.",
                tensor=name,
                count=len(stored),
                low=stored.min(),
                high=stored.max(),
                width=k,
                groups=groups,
            )
        )
    return stored


def _part(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A packed tensor: words as stored, scales and 8-bit floats as float32 values."""
    codes, kind = checkpoint.load(name), checkpoint.tensors[name].dtype
    if kind.name == "F8_E8M0":
        return np.where(codes == 0xFF, np.float32(np.nan), np.exp2(codes.astype(np.float32) - 127)).astype(np.float32)
    if kind.name == "F8_E4M3":
        return E4M3_VALUES[codes]
    if not kind.is_float:
        return codes
    if kind.name not in (*CASTS, "F64"):
        raise BadCheckpoint(_("{tensor}: dtype {dtype} cannot be decoded.", tensor=name, dtype=kind.name))
    return from_codes(codes, kind.name).astype(np.float32)


def _e4m3_values() -> np.ndarray:
    """f32[256]: value of each E4M3 code, bias 7, no infinities, NaN at 0x7F and 0xFF."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float32)
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * np.exp2(exponent - 7.0))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -values, values).astype(np.float32)


E4M3_VALUES = _e4m3_values()
