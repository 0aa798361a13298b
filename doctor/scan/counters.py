"""Exact counters over raw tensor bytes, taken chunk by chunk at the speed memory reads, and mergeable.

`scan` counts one chunk; `Stats.merge` joins chunks in tensor order: integers add, bounds take the larger or smaller,
so the facts of a tensor do not depend on how it was cut. The native library does the work when it is there
(cpu/scan.c), NumPy otherwise; both agree exactly on everything but the rounding of `sum` and `sumsq`.

An 8- or 16-bit type has at most 65,536 codes: its NumPy path counts codes and looks each one up in a table of what it
is. Wider types are compared as integers, magnitude code against the limits below, which is exact and does not depend
on how the machine treats NaN or subnormals.
"""

import ctypes
import os
import struct
from dataclasses import dataclass
from functools import cache

import numpy as np

from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.safetensors import ShardFile
from doctor.scan import native
from doctor.scan.native import native_path  # noqa: F401  re-exported: reports say which path counted
from doctor.scan.stats import EMPTY, Stats

FP16_OVERFLOW = 65520.0  # halfway from 65504, the largest fp16, to 65536: ties go to even, so it becomes Inf
FP16_UNDERFLOW = 2.0**-25  # half the smallest fp16 subnormal: ties go to even, so it becomes 0
NUMPY_PART = 1 << 16  # elements a NumPy pass over a wide type takes at a time: its temporaries stay in cache


@dataclass(frozen=True)
class _Wide:
    """Magnitude codes of a 16-, 32- or 64-bit float: the sign bit cleared, they order as the magnitudes do.

    Larger than inf is NaN; overflow is the smallest code that fp16 rounds to Inf, underflow the largest that it rounds
    to 0, normal the smallest normal value. The same numbers stand in cpu/scan.c.
    """

    native: str
    inf: int
    overflow: int
    underflow: int
    normal: int


WIDE = {
    "BF16": _Wide("bf16", 0x7F80, 0x4780, 0x3300, 0x0080),
    "F16": _Wide("f16", 0x7C00, 0x7C00, 0, 0x0400),
    "F32": _Wide("f32", 0x7F800000, 0x477FF000, 0x33000000, 0x00800000),
    "F64": _Wide("f64", 0x7FF0 << 48, 0x40EFFE << 40, 0x3E6 << 52, 0x001 << 52),
}

# exponent bits, mantissa bits, bias, and which codes are special: "ieee" Inf and NaN in the top exponent, "fn" only NaN
# at 0x7f and 0xff, "fnuz" only NaN at 0x80. Sources: OCP 8-bit floating point 1.0; arXiv 2206.02915 for fnuz.
NARROW = {
    "F8_E4M3": (4, 3, 7, "fn"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": (5, 2, 16, "fnuz"),
    "F8_E8M0": (8, 0, 127, "scale"),
}


# scan_result of cpu/scan.c: six counters, first_nonfinite, then absmax, min, max, sum and sumsq.
_RESULT = struct.Struct("=7q5d")


def can_scan(dtype_name: str) -> bool:
    """Whether `scan` and its neighbours know this safetensors type."""
    return dtype_name in WIDE or dtype_name in NARROW


def scan(buffer, dtype_name: str, offset: int = 0) -> Stats:
    """Statistics of a chunk of whole elements of type `dtype_name` (a safetensors name, see `can_scan`).

    buffer: bytes, memoryview or C-contiguous array, at any address. offset: index of its first element in the tensor.
    Raises ValueError on a type it does not know or on part of an element.
    """
    codes = _codes(buffer, dtype_name)
    function = native.function(f"doctor_scan_{WIDE[dtype_name].native}") if dtype_name in WIDE else None
    if not codes.size:
        return EMPTY
    if function is not None:
        out = ctypes.create_string_buffer(_RESULT.size)
        function(_address(codes), ctypes.c_int64(codes.size), out)
        return _unpacked(codes.size, offset, out)
    if codes.itemsize <= 2:
        counted = _scan_by_codes(codes, dtype_name)
        first = counted.pop("first_nonfinite")
        return Stats(numel=codes.size, first_nonfinite=first + offset if first >= 0 else -1, **counted)
    return _scan_wide(codes, dtype_name, offset)


def read_and_scan(file: ShardFile, at: int, buffer: memoryview, dtype_name: str, offset: int = 0) -> Stats:
    """`scan` of what this reads into `buffer` from byte `at` of a shard.

    The native library counts each 128 KiB as soon as it is read, while the cache holds it. Raises
    BadCheckpoint where the file ends before that, OSError where it cannot be read, ValueError as `scan`.
    """
    by_native = dtype_name in WIDE and file.plain
    function = native.function(f"doctor_read_scan_{WIDE[dtype_name].native}", ctypes.c_int64) if by_native else None
    if function is None:
        file.read_into(at, buffer)
        return scan(buffer, dtype_name, offset)
    codes, out = _codes(buffer, dtype_name), ctypes.create_string_buffer(_RESULT.size)
    place = ctypes.byref(ctypes.c_char.from_buffer(buffer)) if len(buffer) else None
    got = function(file.fileno(), ctypes.c_int64(at), place, ctypes.c_int64(codes.size), out)
    if got < 0:
        raise OSError(-got, os.strerror(-got), file.path)
    if got < len(buffer):
        raise file.ended(at + got, len(buffer) - got)
    return _unpacked(codes.size, offset, out)


def _unpacked(numel: int, offset: int, out: ctypes.Array) -> Stats:
    nan, inf, zero, subnormal, overflow, underflow, first, *floats = _RESULT.unpack(out)
    absmax, low, high, total, squares = floats
    first = first + offset if first >= 0 else -1
    return Stats(numel, nan, inf, zero, subnormal, overflow, underflow, absmax, low, high, total, squares, first)


def code_hist(buffer, dtype_name: str) -> np.ndarray:
    """How often each code occurs: i64[65536] of a 16-bit type, i64[256] of an 8-bit one."""
    return _hist(_codes(buffer, dtype_name))


def group_zeros(buffer, dtype_name: str, k: int, group: int) -> tuple[int, int, tuple[int, int] | None]:
    """Zero groups among whole rows of a weight [rows, k]; a group is `group` columns of a row, or the row for -1.

    Returns the number of groups whose values are all 0, the number of those that are all 0 only after a cast to fp16,
    and (row in the chunk, group in the row) of the first of either, or None. Where `group` does not divide k the last
    group of a row is shorter.
    """
    codes = _rows(buffer, dtype_name, k)
    group = k if group == -1 else group
    per_row = -(-k // group)
    function = native.function(f"doctor_group_zeros_{WIDE[dtype_name].native}") if dtype_name in WIDE else None
    if function is not None:
        out = (ctypes.c_int64 * 3)()
        function(_address(codes), *map(ctypes.c_int64, (len(codes), k, group)), out)
        zero, zero_fp16, first = out
    else:
        largest = np.maximum.reduceat(_fp16_rank(codes, dtype_name), np.arange(0, k, group), axis=1).ravel()
        zero, zero_fp16 = _count(largest == 0), _count(largest == 1)
        first = int(np.argmax(largest < 2)) if zero + zero_fp16 else -1
    return zero, zero_fp16, divmod(first, per_row) if first >= 0 else None


def one_signed_groups(buffer, dtype_name: str, k: int, group: int) -> tuple[int, int]:
    """(groups that hold a weight other than 0, those of them whose weights have one sign) of whole rows of a weight
    [rows, k].

    `group` columns of a row, which must divide k. NaN counts by its sign bit. Not for F8_E8M0, which has no sign.
    """
    codes = _rows(buffer, dtype_name, k).reshape(-1, group)
    signed = codes.view(f"<i{codes.itemsize}")
    # As signed integers codes above 0 are positive values; as unsigned ones those above -0.0 are negative values.
    positive, negative = signed.max(axis=1) > 0, codes.max(axis=1) > 1 << (8 * codes.itemsize - 1)
    unlike = _count(positive ^ negative)
    return unlike + _count(positive & negative) if unlike else _count(positive), unlike


def row_col_absmax(buffer, dtype_name: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Largest absolute value of each row, f32[rows], and of each column, f32[k], of whole rows of a weight [rows, k].

    A row or column that holds NaN or Inf reads inf, so it is never taken for one of zeros. Both are float64 for F64.
    """
    codes = _rows(buffer, dtype_name, k)
    if dtype_name in NARROW:
        magnitudes = _table(dtype_name).magnitude[codes]
        return magnitudes.max(axis=1), magnitudes.max(axis=0, initial=0)
    kind = WIDE[dtype_name]
    function = native.function(f"doctor_absmax_{kind.native}")
    if function is not None:
        by_row, by_column = np.empty(len(codes), codes.dtype), np.empty(k, codes.dtype)
        function(_address(codes), ctypes.c_int64(len(codes)), ctypes.c_int64(k), _address(by_row), _address(by_column))
    else:
        magnitudes = np.minimum(_magnitudes(codes), codes.dtype.type(kind.inf))
        by_row, by_column = magnitudes.max(axis=1), magnitudes.max(axis=0, initial=0)
    return _floats(by_row, dtype_name), _floats(by_column, dtype_name)


def _codes(buffer, dtype_name: str) -> np.ndarray:
    """The codes of the chunk as unsigned integers, a view; the address may be unaligned."""
    if not can_scan(dtype_name):
        raise ValueError(f"scan: {dtype_name} is not one of {', '.join([*WIDE, *NARROW])}")
    code = _code_type(dtype_name)
    size = memoryview(buffer).nbytes
    if size % code.itemsize:
        raise ValueError(f"scan: {size} bytes are no whole number of {dtype_name} elements of {code.itemsize} bytes")
    return np.frombuffer(buffer, code) if size else np.empty(0, code)


@cache
def _code_type(dtype_name: str) -> np.dtype:
    return np.dtype(CODE_NUMPY[dtype_name].replace("f", "u"))


def _rows(buffer, dtype_name: str, k: int) -> np.ndarray:
    codes = _codes(buffer, dtype_name)
    if codes.size % k:
        raise ValueError(f"scan: {codes.size} elements are no whole number of rows of {k}")
    return codes.reshape(-1, k)


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])  # .ctypes builds an object of its own for it


def _count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))  # NumPy 2.4 gives its own integer, which JSON refuses


def _magnitudes(codes: np.ndarray) -> np.ndarray:
    return codes & codes.dtype.type((1 << (8 * codes.itemsize - 1)) - 1)


def _floats(codes: np.ndarray, dtype_name: str) -> np.ndarray:
    """Values of codes of a wide type: f32, or f64 for F64."""
    if dtype_name == "BF16":
        return (codes.astype("<u4") << 16).view("<f4")
    values = codes.view(f"<f{codes.itemsize}")
    return values.astype(np.float32) if dtype_name == "F16" else values


def _fp16_rank(codes: np.ndarray, dtype_name: str) -> np.ndarray:
    """u8 of each element: 0 if it is 0, 1 if it becomes 0 in fp16, 2 otherwise."""
    if dtype_name in NARROW:
        table = _table(dtype_name)
        return np.where(table.zero, 0, np.where(table.underflow, 1, 2)).astype(np.uint8)[codes]
    magnitudes = _magnitudes(codes)
    return (magnitudes > 0).astype(np.uint8) + (magnitudes > WIDE[dtype_name].underflow)


@dataclass(frozen=True)
class _Table:
    """What each code of an 8- or 16-bit type is: bool arrays by code, and f64 values with 0 for the non-finite."""

    nan: np.ndarray
    inf: np.ndarray
    zero: np.ndarray
    subnormal: np.ndarray
    overflow: np.ndarray
    underflow: np.ndarray
    value: np.ndarray
    magnitude: np.ndarray  # f32, inf for the non-finite


@cache
def _table(dtype_name: str) -> _Table:
    if dtype_name in WIDE:
        codes = np.arange(65536, dtype="<u2")
        with np.errstate(invalid="ignore"):  # a signalling NaN among the codes
            values = _floats(codes, dtype_name).astype(np.float64)
        magnitude = _magnitudes(codes)
        subnormal = (magnitude > 0) & (magnitude < WIDE[dtype_name].normal)
    else:
        values, subnormal = _narrow_values(*NARROW[dtype_name])
    absolute, finite = np.abs(values), np.isfinite(values)
    return _Table(
        nan=np.isnan(values),
        inf=np.isinf(values),
        zero=values == 0,
        subnormal=subnormal,
        overflow=finite & (absolute >= FP16_OVERFLOW),
        underflow=(values != 0) & (absolute <= FP16_UNDERFLOW),
        value=np.where(finite, values, 0.0),
        magnitude=np.where(finite, absolute, np.inf).astype(np.float32),
    )


def _narrow_values(exponent_bits: int, mantissa_bits: int, bias: int, special: str) -> tuple[np.ndarray, np.ndarray]:
    """The 256 values f64 of an 8-bit type, and which of them are subnormal."""
    codes = np.arange(256)
    if special == "scale":  # no sign, no zero, no fraction: 2^(code - 127)
        return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - bias)), np.zeros(256, bool)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    subnormal = (exponent == 0) & (mantissa > 0)
    fraction = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits))
    values = np.ldexp(fraction.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    values = np.where(codes & 0x80, -values, values)
    if special == "ieee":
        top = exponent == (1 << exponent_bits) - 1
        values = np.where(top, np.where(mantissa > 0, np.nan, np.copysign(np.inf, values)), values)
    elif special == "fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        values[0x80] = np.nan
    return values, subnormal


def _hist(codes: np.ndarray) -> np.ndarray:
    if codes.itemsize > 2:
        raise ValueError(f"code_hist: {8 * codes.itemsize}-bit codes have no table; 8 and 16 bits do")
    n_codes = 1 << (8 * codes.itemsize)
    function = native.function(f"doctor_hist{8 * codes.itemsize}")
    if function is None:
        return np.bincount(codes, minlength=n_codes)
    counts = np.zeros((codes.itemsize, n_codes), np.int64)  # two tables for 16 bits, see scan.c
    function(_address(codes), ctypes.c_int64(codes.size), _address(counts))
    return counts.sum(axis=0)


def _scan_by_codes(codes: np.ndarray, dtype_name: str) -> dict:
    """Stats fields of n > 0 codes of an 8- or 16-bit type, from how often each code occurs."""
    hist = _hist(codes)
    seen = np.flatnonzero(hist)
    counts = hist[seen]
    table = _table(dtype_name)
    n = {
        name: int(counts[getattr(table, name)[seen]].sum())
        for name in ("nan", "inf", "zero", "subnormal", "overflow", "underflow")
    }
    nonfinite = table.nan | table.inf
    values = table.value[seen]
    finite_values = values[~nonfinite[seen]]
    low, high = (finite_values.min(), finite_values.max()) if finite_values.size else (0.0, 0.0)
    return {
        "n_nan": n["nan"],
        "n_inf": n["inf"],
        "n_zero": n["zero"],
        "n_subnormal": n["subnormal"],
        "n_fp16_overflow": n["overflow"],
        "n_fp16_underflow": n["underflow"],
        "absmax": float(max(-low, high)),
        "min": float(low) + 0.0,
        "max": float(high) + 0.0,
        "sum": float(values @ counts),
        "sumsq": float((values * values) @ counts),
        "first_nonfinite": int(np.argmax(nonfinite[codes])) if n["nan"] + n["inf"] else -1,
    }


def _scan_wide(codes: np.ndarray, dtype_name: str, offset: int) -> Stats:
    """Stats of F32 or F64 codes, merged over parts that stay in cache."""
    total = EMPTY
    for start in range(0, codes.size, NUMPY_PART):
        total = total.merge(_scan_wide_part(codes[start : start + NUMPY_PART], dtype_name, offset + start))
    return total


def _scan_wide_part(codes: np.ndarray, dtype_name: str, offset: int) -> Stats:
    kind = WIDE[dtype_name]
    magnitudes = _magnitudes(codes)
    n_nonfinite = _count(magnitudes >= kind.inf)
    n_nan = _count(magnitudes > kind.inf) if n_nonfinite else 0
    n_zero = _count(magnitudes == 0)
    values = _floats(codes, dtype_name)
    if n_nonfinite:
        values = values[magnitudes < kind.inf]
    low, high = (float(values.min()) + 0.0, float(values.max()) + 0.0) if values.size else (0.0, 0.0)
    values = values.astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # squares and sums of F64 may leave float64
        total, squares = float(values.sum()), float(values @ values)
    return Stats(
        numel=codes.size,
        n_nan=n_nan,
        n_inf=n_nonfinite - n_nan,
        n_zero=n_zero,
        n_subnormal=_count(magnitudes < kind.normal) - n_zero,
        n_fp16_overflow=_count(magnitudes >= kind.overflow) - n_nonfinite,
        n_fp16_underflow=_count(magnitudes <= kind.underflow) - n_zero,
        absmax=max(-low, high),
        min=low,
        max=high,
        sum=total,
        sumsq=squares,
        first_nonfinite=offset + int(np.argmax(magnitudes >= kind.inf)) if n_nonfinite else -1,
    )
