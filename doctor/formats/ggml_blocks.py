"""Blocks of GGUF files as float values, in NumPy: what llama.cpp computes with, bit for bit.

A row is a run of blocks (doctor/checkpoint/ggml_types.py has their sizes). K types have 256 elements, in blocks of 32
or 16 whose 6-bit (Q2_K: 4-bit) scales are multiples of one float16 scale of the whole. Products are taken in float32
in llama.cpp's order, since (d * s) * q and d * (s * q) differ in the last bit.

Types whose codes are points of a lattice (IQ1, IQ2, IQ3), ternary ones and NVFP4 are decoded by the package gguf, which
has their tables.

Source: ggml-org/llama.cpp ggml/src/ggml-common.h (layouts), ggml/src/ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Callable

from doctor.checkpoint.ggml_types import GgmlType
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _

# Levels of the codes of IQ4_NL and IQ4_XS, and half those of MXFP4.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def decode(raw: np.ndarray, kind: GgmlType, width: int) -> np.ndarray:
    """f32[rows, width] of bytes u8[rows, width / block * nbytes]. Raises BadCheckpoint for a type that is not read."""
    rows = raw.shape[0]
    if kind.name in _PLAIN:
        return _PLAIN[kind.name](np.ascontiguousarray(raw)).reshape(rows, width)
    if kind.name in _BLOCKS:
        blocks = raw.reshape(-1, kind.nbytes)
        return _BLOCKS[kind.name](blocks).reshape(rows, width)
    return _by_library(raw, kind).reshape(rows, width)


def can_decode(kind: GgmlType) -> bool:
    """Whether decode() reads a type with what is installed here."""
    if kind.name in _PLAIN or kind.name in _BLOCKS:
        return True
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import _type_traits
    except ImportError:
        return False
    number = {int(known): known for known in GGMLQuantizationType}.get(kind.number)
    return number is not None and number in _type_traits


def _by_library(raw: np.ndarray, kind: GgmlType) -> np.ndarray:
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise BadCheckpoint(
            _("{type}: its tables are in the package gguf, which is not installed.", type=kind.name),
            _("Install it: pip install gguf"),
        ) from None
    try:
        return dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(kind.number))
    except (NotImplementedError, ValueError):
        raise BadCheckpoint(_("{type}: the package gguf does not decode this type.", type=kind.name)) from None


def halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """f32[blocks, 1] of the float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """u8[n, 2m] of u8[n, m]: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], 1)


def _fifth(blocks: np.ndarray, at: int) -> np.ndarray:
    """u8[n, 32] of 0 and 16: the fifth bits in the u32 at byte `at`."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 2:18]).astype(np.float32) - 8) * halves(b, 0)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _nibbles(b[:, 4:20]) * halves(b, 0) + halves(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return ((_nibbles(b[:, 6:22]) | _fifth(b, 2)).astype(np.float32) - 16) * halves(b, 0)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 8:24]) | _fifth(b, 4)) * halves(b, 0) + halves(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:34].view(np.int8).astype(np.float32) * halves(b, 0)


def _quarters(packed: np.ndarray) -> np.ndarray:
    """u8[n, 256] of 2-bit codes u8[n, 64]: of each 32 bytes the lowest two bits first, then the next ones."""
    n = len(packed)
    return ((packed.reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3).reshape(n, 256)


def _q2_k(b: np.ndarray) -> np.ndarray:
    n = len(b)
    scale = halves(b, 80) * (b[:, :16] & 15)
    low = halves(b, 82) * (b[:, :16] >> 4)
    codes = _quarters(b[:, 16:80]).reshape(n, 16, 16)
    return scale[:, :, None] * codes - low[:, :, None]


def _q3_k(b: np.ndarray) -> np.ndarray:
    n = len(b)
    low = _nibbles(b[:, 96:104])
    high = (b[:, None, 104:108] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)) & 3
    scale = halves(b, 108) * ((low | high.reshape(n, 16) << 4).astype(np.float32) - 32)
    top = (b[:, None, :32] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    codes = _quarters(b[:, 32:96]).reshape(n, 256).astype(np.float32) - 4 * (1 - top.reshape(n, 256).astype(np.float32))
    return scale[:, :, None] * codes.reshape(n, 16, 16)


def scales_and_mins(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, mins) u8[n, 8] of the 12 bytes in which Q4_K and Q5_K keep them."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    return (
        np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], 1),
        np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], 1),
    )


def _halves_of_64(packed: np.ndarray) -> np.ndarray:
    """u8[n, 8, 32] of 4-bit codes u8[n, 128]: of each 32 bytes the low halves, then the high ones."""
    n = len(packed)
    return ((packed.reshape(n, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & 15).reshape(n, 8, 32)


def _affine_k(b: np.ndarray, codes: np.ndarray) -> np.ndarray:
    scales, mins = scales_and_mins(b[:, 4:16])
    return (halves(b, 0) * scales)[:, :, None] * codes - (halves(b, 2) * mins)[:, :, None]


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _affine_k(b, _halves_of_64(b[:, 16:144]))


def _q5_k(b: np.ndarray) -> np.ndarray:
    fifth = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & 1
    return _affine_k(b, _halves_of_64(b[:, 48:176]) | fifth << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    n = len(b)
    low = (b[:, :128].reshape(n, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & 15
    high = (b[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3
    codes = (low.reshape(n, 256) | high.reshape(n, 256) << 4).astype(np.float32) - 32
    scale = halves(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return scale[:, :, None] * codes.reshape(n, 16, 16)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return halves(b, 0) * np.array(IQ4_LEVELS, np.float32)[_nibbles(b[:, 2:18])]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    n = len(b)
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).reshape(n, 8)
    scale = halves(b, 0) * ((low | (high & 3) << 4).astype(np.float32) - 32)
    codes = np.concatenate([b[:, 8:136].reshape(n, 8, 16) & 15, b[:, 8:136].reshape(n, 8, 16) >> 4], 2)
    return scale[:, :, None] * np.array(IQ4_LEVELS, np.float32)[codes]


def _mxfp4(b: np.ndarray) -> np.ndarray:
    # half of 2^(e - 127), whose smallest two are subnormal; 255 is NaN in the format and 2^127 in llama.cpp
    scale = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128).astype(np.float32)
    return scale * np.array(MXFP4_LEVELS, np.float32)[_nibbles(b[:, 1:17])]


_PLAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": _bf16,
    "F64": lambda raw: raw.view("<f8").astype(np.float32),
}
_BLOCKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
