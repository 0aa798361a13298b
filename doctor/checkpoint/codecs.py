"""Raw codes and the float32 values they stand for: decode, encode, and which codes are NaN or Inf.

A *code* is the integer of a value's bits in its safetensors dtype (`CODE_NUMPY` names the NumPy type that holds it).
Rounding is to nearest, ties to even, as IEEE 754 and every runtime do. Nothing here refuses a value: a number that the
dtype cannot hold becomes Inf, and whoever may not write Inf tests for it.
"""

from __future__ import annotations

from typing import Any

from doctor.checkpoint.dtypes import DTYPES
from doctor.core.lazy_numpy import np

_EXPONENT = {"F16": (0x7C00, 0x7FFF), "BF16": (0x7F80, 0x7FFF), "F8_E5M2": (0x7C, 0x7F)}


def from_codes(codes: np.ndarray, dtype_name: str) -> np.ndarray:
    """float32 values of raw codes (float64 for F64). Raises ValueError for types that are not F16, BF16, F32, F64."""
    if dtype_name == "BF16":
        return (codes.astype(np.uint32) << 16).view(np.float32)
    if dtype_name == "F16":
        return codes.view(np.float16).astype(np.float32)
    if dtype_name in ("F32", "F64"):
        return codes
    raise ValueError(f"{dtype_name} is not read as values here")


def to_codes(values: np.ndarray, dtype_name: str) -> np.ndarray:
    """Raw codes of float32 values in F16, BF16 or F32, rounded to nearest, ties to even."""
    if dtype_name == "BF16":
        return to_bf16(values)
    if dtype_name == "F16":
        with np.errstate(over="ignore"):  # Inf is the right code: who may not have it looks for it
            return values.astype(np.float16).view(np.uint16)
    if dtype_name == "F32":
        return values.astype(np.float32)
    raise ValueError(f"{dtype_name} is not written as values here")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 codes of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(
        (bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0) | (bits >> 31).astype(np.uint16) << 15, rounded
    ).astype(np.uint16)


def encode(value: float, dtype_name: str) -> Any:
    """One raw code for a finite value. Raises ValueError for types that hold no such value."""
    if dtype_name in ("F32", "F64"):
        return np.dtype(DTYPES[dtype_name].torch).type(value)
    if dtype_name == "F16":
        return np.float16(value).view(np.uint16)
    if dtype_name == "BF16":
        return to_bf16(np.asarray(value, np.float32))[()]
    if value == 0 and dtype_name.startswith("F8") and dtype_name != "F8_E8M0":
        return np.uint8(0)
    raise ValueError(f"{dtype_name} has no code for {value}")


def nonfinite_mask(codes: np.ndarray, dtype_name: str) -> np.ndarray:
    """bool array: which raw codes are NaN or Inf."""
    if dtype_name in ("F32", "F64"):
        return ~np.isfinite(codes)
    if dtype_name in _EXPONENT:
        exponent, _ = _EXPONENT[dtype_name]
        return (codes & exponent) == exponent
    if dtype_name == "F8_E4M3":
        return (codes & 0x7F) == 0x7F
    if dtype_name in ("F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        return codes == 0x80
    if dtype_name == "F8_E8M0":
        return codes == 0xFF
    return np.zeros(codes.shape, bool)
