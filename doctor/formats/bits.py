"""Codes to the int32 words that engines read, and back: one law for every packed format, in NumPy and in torch.

Along one axis the codes form a little-endian bit stream: code e lies in bits [e*b, e*b+b), and stream bit p is bit
p % 32 of word p // 32. Thirty-two codes fill b words exactly, so packing goes through blocks of 32 codes. AWQ differs
by an order inside each word.

On a GPU the quantizer's CUDA kernels do the same, several operations in one: doctor/quant hands them over with
`use_kernels`. They are proved against the functions here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from doctor.core.lazy_numpy import np
from doctor.formats.arrays import Array, cast, contiguous, is_torch, zeros

_KERNELS: list[Any] = []


def use_kernels(kernels: Any) -> None:
    """Pack and unpack tensors on a GPU by these: a module with `available(device)` and the functions called here."""
    _KERNELS[:] = [kernels]


def kernels_for(array: Array) -> Any | None:
    """The kernels that take this array; None for arrays of the CPU and where there are none."""
    if is_torch(array) and array.is_cuda and _KERNELS and _KERNELS[0].available(array.device) is None:
        return _KERNELS[0]
    return None


def pack_columns(codes: Array, bits: int) -> Array:
    """i32[ceil(m*bits/32), c]: each column of codes [m, c] as a bit stream, the last word filled up with zeros.

    Any integer dtype; values must be 0..2^bits-1. A field of 32 neighbouring words is one contiguous run of c.
    """
    kernels = kernels_for(codes)
    if kernels is not None:
        return kernels.pack_columns(cast(codes, "U8"), bits)
    m, columns = codes.shape
    blocks = -(-m // 32)
    fields = _padded(codes, blocks * 32).reshape(blocks, 32, columns)
    packed = zeros((blocks, bits, columns), "I32", codes)
    for word, code, shift in _placements(bits):
        field = cast(fields[:, code], "I32")
        packed[:, word] |= field << shift if shift >= 0 else field >> -shift
    return contiguous(packed.reshape(blocks * bits, columns)[: -(-m * bits // 32)])


def unpack_columns(words: Array, bits: int, count: int) -> Array:
    """codes u8[count, c] from the columns of words i32[at least ceil(count*bits/32), c]."""
    columns, blocks = words.shape[1], -(-count // 32)
    packed = _padded(words, blocks * bits)[: blocks * bits].reshape(blocks, bits, columns)
    codes = zeros((blocks, 32, columns), "U8", words)
    for word, code, shift in _placements(bits):
        value = packed[:, word]
        # >> of a negative int32 copies its sign downwards, and a field that crosses words meets its other half: mask.
        part = (value >> shift) & low(min(bits, 32 - shift)) if shift >= 0 else (value << -shift) & low(bits)
        codes[:, code] |= cast(part, "U8")
    return codes.reshape(blocks * 32, columns)[:count]


def pack_rows(codes: Array, bits: int) -> Array:
    """i32[r, ceil(m*bits/32)]: each row of codes [r, m] as a bit stream."""
    kernels = kernels_for(codes)
    if kernels is not None:
        return kernels.pack_rows(cast(codes, "U8"), bits)
    return contiguous(pack_columns(contiguous(codes.T), bits).T)


def unpack_rows(words: Array, bits: int, count: int) -> Array:
    """codes u8[r, count] from the rows of words i32[r, at least ceil(count*bits/32)]."""
    return contiguous(unpack_columns(contiguous(words.T), bits, count).T)


def unpack_whole_fields(words: Array, bits: int, count: int) -> Array:
    """codes u8[r, count] from rows in which no code crosses a word: floor(32/b) codes each, the rest unused."""
    shifts = [place * bits for place in range(32 // bits)]
    codes = zeros((*words.shape, len(shifts)), "U8", words)
    for place, shift in enumerate(shifts):
        codes[:, :, place] = cast((words >> shift) & low(bits), "U8")
    return codes.reshape(len(words), -1)[:, :count]


def low(bits: int) -> int:
    """A mask of the lowest bits."""
    return (1 << bits) - 1


def words_of(count: int, bits: int) -> int:
    """int32 words that `count` codes fill."""
    return -(-count * bits // 32)


def repeated_word(code: int, bits: int) -> int:
    """The unsigned word in which every code is the same, for widths that divide 32."""
    return sum(code << shift for shift in range(0, 32, bits))


def _padded(rows: Array, count: int) -> Array:
    """rows with zero rows at their end, up to count."""
    short = count - len(rows)
    if short <= 0:
        return rows
    if is_torch(rows):
        import torch

        return torch.nn.functional.pad(rows, (0, 0, 0, short))
    return np.pad(rows, ((0, short), (0, 0)))


def _placements(bits: int) -> Iterator[tuple[int, int, int]]:
    """(word, code, shift) for the 32 codes in `bits` words; a negative shift puts a code's upper bits in the next
    word.
    """
    for code in range(32):
        word, shift = divmod(code * bits, 32)
        yield word, code, shift
        if shift + bits > 32:
            yield word + 1, code, shift - 32
