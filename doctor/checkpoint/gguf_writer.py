"""GGUF files from metadata and tensors: the header at once, data tensor by tensor, so that nothing is held whole.

Written here and not by the package gguf: a run of doctor needs no further package for it, and the file is made beside
its place by the same steps as every other output.

Source: ggml-org/llama.cpp ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from doctor.checkpoint.ggml_types import GgmlType
from doctor.checkpoint.gguf import ALIGNMENT, ARRAY, MAGIC, STRING

U32, I32, F32, BOOL = 4, 5, 6, 7
_LETTERS = {U32: "I", I32: "i", F32: "f", BOOL: "?"}


class Value(NamedTuple):
    """One metadata value. kind: its type's number in GGUF; of: the type of an array's elements."""

    kind: int
    value: Any
    of: int = 0


def u32(value: int) -> Value:
    return Value(U32, value)


def f32(value: float) -> Value:
    return Value(F32, value)


def boolean(value: bool) -> Value:
    return Value(BOOL, value)


def text(value: str) -> Value:
    return Value(STRING, value)


def texts(values: Sequence[str]) -> Value:
    return Value(ARRAY, values, STRING)


def i32s(values: Sequence[int]) -> Value:
    return Value(ARRAY, values, I32)


def f32s(values: Sequence[float]) -> Value:
    return Value(ARRAY, values, F32)


class Planned(NamedTuple):
    """A tensor that will be written. shape: as PyTorch has it."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block * self.type.nbytes


def write_header(file: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[Planned]) -> None:
    """Everything before the data, with its padding. general.architecture must come first in metadata."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.kind), _value(value)]
    offset = 0
    for tensor in tensors:
        axes = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(axes)}Q", len(axes), *axes)]
        parts.append(struct.pack("<IQ", tensor.type.number, offset))
        offset += padded(tensor.nbytes)
    written = b"".join(parts)
    file.write(written)
    file.write(bytes(padded(len(written)) - len(written)))


def write_data(file: BinaryIO, tensor: Planned, chunks: Iterable[bytes | memoryview]) -> None:
    """One tensor's bytes and its padding. Raises ValueError where they are not as many as the header says."""
    written = sum(file.write(chunk) for chunk in chunks)
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes were written, {tensor.nbytes} were planned")
    file.write(bytes(padded(written) - written))


def padded(size: int) -> int:
    """A size with its padding."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if value.kind == STRING:
        return _string(value.value)
    if value.kind == ARRAY:
        head = struct.pack("<IQ", value.of, len(value.value))
        if value.of == STRING:
            return head + b"".join(map(_string, value.value))
        return head + struct.pack(f"<{len(value.value)}{_LETTERS[value.of]}", *value.value)
    return struct.pack("<" + _LETTERS[value.kind], value.value)
