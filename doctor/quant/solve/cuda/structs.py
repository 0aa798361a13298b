"""ctypes mirrors of the structs in cuda/*.cu, and the constants that both sides share."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

BLOCK = 128  # BLOCK of gptq_block.cu
SPANS = 4  # SPANS of kv_cache.cu
RUN = 8  # RUN of core.cuh
TALLEST = 65535  # blocks in a grid's second direction
KV_BITS = (4, 8)  # widths of ExLlamaV2's cache: Q6 is 8 bits for keys and 4 for values
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
Pointer, I64, I32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _fields(words: str) -> list[tuple[str, Any]]:
    """Fields of "name:type" words, where type is p (pointer), l (i64), i (i32) or f (f32)."""
    types: dict[str, Any] = {"p": Pointer, "l": I64, "i": I32, "f": F32}
    return [(word[:-2], types[word[-1]]) for word in words.split()]


# One to one with the structs of the .cu files, which bear the same names.


class DeviceGridParams(ctypes.Structure):
    """struct Rule: how the grids of a linear are fitted."""

    _fields_ = _fields("top:f half:f zero_min:f sym:i turn:i mse:i dtype:i ratios:i fine:i refits:i")


class Columns(ctypes.Structure):
    """GPTQ's loop over a run of columns."""

    _fields_ = _fields(
        "T:p U:p owner:p scale:p zero:p codes:p errors:p loss:p cost:p candidates:p n:l k:l begin:i count:i width:i"
    )


class Refinement(ctypes.Structure):
    """Coordinate descent over a run of columns."""

    _fields_ = _fields("H:p owner:p scale:p zero:p codes:p pull:p moved:p loss:p n:l k:l begin:i count:i width:i")


class Search(ctypes.Structure):
    """The grid search of all groups."""

    _fields_ = _fields("W:p cost:p candidates:p scale:p zero:p n:l k:l row_stride:l width:i")


class Stream(ctypes.Structure):
    """Codes along one axis as a bit stream."""

    _fields_ = _fields(
        "codes:p words:p lines:l count:l height:l line_stride:l code_stride:l word_line_stride:l "
        "word_stride:l bits:i along_codes:i"
    )


class Packed(ctypes.Structure):
    """A packed linear and where its dequantized weight goes."""

    _fields_ = _fields(
        "words:p zeros:p scales:p owner:p W:p n:l k:l groups:l word_line_stride:l word_stride:l "
        "zero_line_stride:l zero_stride:l scale_row_stride:l scale_group_stride:l row_stride:l column_stride:l bits:i "
        "zero_offset:i dtype:i width:i along_rows:i"
    )


class Difference(ctypes.Structure):
    """AWQ's candidate: the rounded weight less the weight."""

    _fields_ = _fields("W:p s:p D:p n:l k:l width:i source:i")


class Health(ctypes.Structure):
    """struct Health of health_scan.cu."""

    _fields_ = [
        ("counts", ctypes.c_uint64 * 6),
        ("first_nonfinite", ctypes.c_uint64),
        ("highest", ctypes.c_uint32),
        ("lowest", ctypes.c_uint32),
        ("sum", ctypes.c_double),
        ("sumsq", ctypes.c_double),
    ]
