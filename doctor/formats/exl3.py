"""EXL3, ExLlamaV3's own: 16 x 16 tiles of trellis codes between two Hadamard transforms.

| tensor | dtype | shape |
|---|---|---|
| trellis | I16 | [k/16, n/16, 16 K], K bits a weight |
| suh, svh | F16 | [k], [n], signs and scales of inputs and outputs |
| su, sv | I16 | [k/16], [n/16], signs alone, as bits, in old files |
| mcg, mul1 | I32 | [], whose presence names the codebook; neither: 3inst |

A tile is a ring of 256 K bits. Value t is the codebook's number of the 16 bits that end where the first t + 1 steps of
K bits do. W[k, n] = diag(suh) P inner P diag(svh), P the 128-wide Hadamard over sqrt(128), block by block; k and n are
padded to multiples of 128.

Source: turboderp/exllamav3 1.6.5 exllamav3/modules/quant/exl3.py, exllamav3_ext/quant/{codebook,exl3_dq}.cuh,
reconstruct.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.formats.arrays import Array, contiguous
from doctor.formats.base import Format, Parts, Shapes, Texts
from doctor.formats.registry import register

TILE, WIDTH = 16, 128  # of a tile's side, of the Hadamard transform
_FRACTIONS = (24, 40, 56)  # 16 K of the widths between whole bits: 1.5, 2.5, 3.5
_MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


@register
class EXL3(Format):
    """Read only."""

    name = "exl3"
    label = "EXL3"
    quant_methods = ("exl3",)
    part_names = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")
    beside = part_names
    bits = (1, 2, 3, 4, 5, 6, 7, 8)
    padded = (WIDTH, WIDTH)
    writes = False
    client = ""

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        """The width, rounded up where it lies between two."""
        module, _dot, last = info.name.rpartition(".")
        if last != "trellis" or len(info.shape) != 3:
            return None
        sides = all(any(f"{module}.{part}" in tensors for part in pair) for pair in (("suh", "su"), ("svh", "sv")))
        return Scheme(-(-info.shape[2] // 16)) if sides and info.shape[2] else None

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, int] | None:
        return (info.shape[1] * TILE, info.shape[0] * TILE) if len(info.shape) == 3 else None

    def weight_name(self, codes: str) -> str:
        return f"{codes.removesuffix('.trellis')}.weight" if codes.endswith(".trellis") else codes

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        down, across, _bits = shapes["trellis"]
        return across * TILE, down * TILE

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        trellis = parts["trellis"].view(np.uint16)
        k, n = trellis.shape[0] * TILE, trellis.shape[1] * TILE
        if k % WIDTH or n % WIDTH:
            raise BadCheckpoint(
                _("trellis is of [{k}, {n}] weights; both must be multiples of {width}.", k=k, n=n, width=WIDTH)
            )
        inputs, outputs = (_signs(parts, *pair, size) for pair, size in ((("suh", "su"), k), (("svh", "sv"), n)))
        begin, end, _step = (rows or slice(0, n)).indices(n)
        first, last = begin // WIDTH * WIDTH, -(-end // WIDTH) * WIDTH  # whole blocks of the transform
        book = next((name for name in _MULTIPLIERS if name in parts), "3inst")
        inner = tile_values(trellis[:, first // TILE : last // TILE], book).astype(np.float32)
        W = _transformed(_transformed(inner.T).T * inputs[:, None])  # along inputs, then along outputs
        return contiguous((W * outputs[first:last]).T[begin - first : end - first, : shape[1] if shape else k])


def tile_values(tiles: Array, book: str) -> Array:
    """f16[16 a, 16 b] of tiles u16[a, b, 16 K] under a codebook."""
    down, across, length = tiles.shape
    if (length % 16 and length not in _FRACTIONS) or not 16 <= length <= 128:
        raise BadCheckpoint(
            _("a tile has {n} words of 16 bits; must be 16 to 128, 16 for each bit of a weight.", n=length)
        )
    values = np.empty((down, across, TILE * TILE), np.float16)
    for at in range(down):  # a row of tiles at a time: windows are 64 bits a weight
        values[at][:, tile_order()] = codebook(book)[_states(tiles[at])]
    return values.reshape(down, across, TILE, TILE).transpose(0, 2, 1, 3).reshape(down * TILE, across * TILE)


def _states(tiles: Array) -> Array:
    """u16[tiles, 256]: the windows of tiles u16[tiles, 16 K]."""
    halves = tiles.astype(np.uint64)
    words = halves[:, 0::2] | halves[:, 1::2] << np.uint64(16)  # the low half first; bits from the highest down
    bits, steps = tiles.shape[1] * 16, np.arange(1, 257)
    whole = bits // 256
    ends = steps * whole + (steps // 2 if bits % 256 else 0)
    begins = (ends - 16) % bits
    word, shift = begins // 32, begins % 32
    pairs = words[:, word] << np.uint64(32) | words[:, (word + 1) % words.shape[1]]
    return (pairs >> (np.uint64(48) - shift.astype(np.uint64)) & np.uint64(0xFFFF)).astype(np.uint16)


@cache
def codebook(name: str) -> Array:
    """f16[65536]: the number of each state."""
    state = np.arange(1 << 16, dtype=np.uint64)
    mixed = state * 89226354 + 64248484 if name == "3inst" else state * _MULTIPLIERS[name]
    mixed = (mixed & 0xFFFFFFFF).astype(np.uint32)
    if name == "mul1":
        total = mixed.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.uint16)
        whole = (total + np.uint16(0x6400)).view(np.float16).astype(np.float64)
        step, less = (float(np.array([word], np.uint16).view(np.float16)[0]) for word in (0x1EEE, 0xC931))
        return (whole * step + less).astype(np.float16)  # exact in float64, rounded once: a fused multiply-add
    mixed = mixed & np.uint32(0x8FFF8FFF) ^ np.uint32(0x3B603B60)
    halves = mixed.view(np.uint16).reshape(-1, 2).view(np.float16)
    return halves[:, 0] + halves[:, 1]


@cache
def tile_order() -> Array:
    """i64[256]: the place in a row-major tile of value t."""
    t = np.arange(TILE * TILE)
    lane, i = t // 8, t % 8
    row = 2 * (lane % 4) + np.array([0, 1, 8, 9])[i % 4]
    return row * TILE + lane // 4 + 8 * (i // 4)


def _transformed(W: Array) -> Array:
    """W f32[m, n] with each block of 128 columns times the Hadamard matrix over sqrt(128)."""
    return (W.reshape(-1, WIDTH) @ _hadamard()).reshape(W.shape)


@cache
def _hadamard() -> Array:
    """f32[128, 128] in Sylvester's order."""
    H = np.ones((1, 1), np.float32)
    while len(H) < WIDTH:
        H = np.block([[H, H], [H, -H]])
    return (H / np.sqrt(WIDTH)).astype(np.float32)


def _signs(parts: Parts, scales: str, signs: str, size: int) -> Array:
    """f32[size]: signs and scales of one side."""
    if scales in parts:
        found = parts[scales].astype(np.float32).reshape(-1)
    elif signs in parts:
        bits = np.ascontiguousarray(parts[signs]).view(np.uint16)[:, None] >> np.arange(16, dtype=np.uint16) & 1
        found = 1 - 2 * bits.reshape(-1).astype(np.float32)
    else:
        raise KeyError(scales)
    if len(found) != size:
        raise BadCheckpoint(_("{part} has {found} values; must be {size}.", part=scales, found=len(found), size=size))
    return found
