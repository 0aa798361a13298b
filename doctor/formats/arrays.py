"""The few operations that NumPy and torch spell differently, so that one text of packing and unpacking serves both.

`doctor check` and `doctor fix` compute on NumPy arrays and never import torch; the quantizer computes on torch tensors,
on a GPU where there is one. Which of the two an array is, the array itself says.
"""

from __future__ import annotations

import sys
from typing import Any

from doctor.checkpoint.dtypes import DTYPES
from doctor.core.lazy_numpy import np

Array = Any  # np.ndarray or torch.Tensor

# safetensors' names of element types -> NumPy's, for what is packed. BF16 and 8-bit floats are torch's alone.
_NUMPY = {"I32": "int32", "I64": "int64", "U8": "uint8", "I8": "int8", "F16": "float16", "F32": "float32"}


def is_torch(array: Array) -> bool:
    """Whether this is a torch tensor."""
    return "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor)


def cast(array: Array, dtype: str) -> Array:
    """The values in another element type ("I32", "F16", …); the array itself where it has it."""
    if is_torch(array):
        return array.to(_torch_dtype(dtype))
    return array.astype(_NUMPY[dtype], copy=False)


def zeros(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """Zeros, where and of which library `like` is."""
    if is_torch(like):
        return sys.modules["torch"].zeros(shape, dtype=_torch_dtype(dtype), device=like.device)
    return np.zeros(shape, _NUMPY[dtype])


def full(shape: tuple[int, ...], value: int, dtype: str, like: Array) -> Array:
    """An array of one value, where and of which library `like` is."""
    made = zeros(shape, dtype, like)
    made[...] = value
    return made


def numbers(values: tuple[float, ...], like: Array) -> Array:
    """f32[len(values)], where and of which library `like` is."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.tensor(values, dtype=torch.float32, device=like.device)
    return np.array(values, np.float32)


def interleaved(first: Array, second: Array) -> Array:
    """[n, 2m] of two [n, m]: their columns in turn."""
    n, m = first.shape
    if is_torch(first):
        return sys.modules["torch"].stack((first, second), -1).reshape(n, 2 * m)
    return np.stack((first, second), -1).reshape(n, 2 * m)


def counted(count: int, like: Array) -> Array:
    """i32[count] of 0, 1, 2 …, where and of which library `like` is."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.arange(count, dtype=torch.int32, device=like.device)
    return np.arange(count, dtype=np.int32)


def contiguous(array: Array) -> Array:
    """The array with its elements in C order."""
    return array.contiguous() if is_torch(array) else np.ascontiguousarray(array)


def repeated(array: Array, times: int, axis: int) -> Array:
    """Each element of the axis `times` times in a row."""
    return array.repeat_interleave(times, axis) if is_torch(array) else array.repeat(times, axis)


def taken(array: Array, index: Array, axis: int) -> Array:
    """Elements of the axis by i32 index."""
    return array.index_select(axis, index) if is_torch(array) else array.take(index, axis)


def _torch_dtype(dtype: str) -> Any:
    return getattr(sys.modules["torch"], str(DTYPES[dtype].torch))
