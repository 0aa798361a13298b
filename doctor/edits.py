"""The closed set of edits: values that say what a cure changes, and the array arithmetic that carries them out.

An edit never touches disk. `checkpoint view` (view.py) reads through them, `plan` composes them, `writer` materialises
the view; so `quantize --fix` and `fix -o` run the same code. The same edit twice is once; two different edits on one
target are refused by the plan.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from doctor.dtypes import DTYPES
from doctor.shard import TensorInfo

PHASES = ("bytes", "shape", "names", "config", "index", "recipe")


class _Missing:
    """Stands for "the key is not there" in `expect`."""

    def __repr__(self):
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True)
class SetJson:
    """Set one value of a JSON file, the rest of its text untouched. `expect` is the value now there (MISSING: none)."""

    file: str
    pointer: str
    value: object
    expect: object = MISSING
    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}#{self.pointer}"


@dataclass(frozen=True)
class RemoveJson:
    """Remove one key of a JSON file. `expect` is the value now there; None asks for none in particular."""

    file: str
    pointer: str
    expect: object = None
    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}#{self.pointer}"


@dataclass(frozen=True)
class ReplaceNonfinite:
    """NaN and ±Inf of one tensor become `value`. Never part of a blanket fix: it invents weights."""

    tensor: str
    value: float = 0.0
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class PadTensor:
    """Grow one axis to `size` with zeros. The axis is `blocks` equal parts, each grown alike (fused halves, head groups).

    spread: zeros stand evenly between the values, so that no group of neighbours is all zero; else at each part's end.
    """

    tensor: str
    axis: int
    size: int
    blocks: int = 1
    spread: bool = True
    phase = "shape"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:axis{self.axis}"


@dataclass(frozen=True)
class DropTensor:
    """Leave one tensor out."""

    tensor: str
    phase = "names"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:name"


@dataclass(frozen=True)
class RebuildIndex:
    """Write model.safetensors.index.json anew from the shards' headers."""

    phase = "index"
    target = "index"


@dataclass(frozen=True)
class SetRecipe:
    """Change one field of the recipe; the recipe itself allows one direction only."""

    field: str
    value: object
    phase = "recipe"

    @property
    def target(self) -> str:
        return f"recipe:{self.field}"


Edit = SetJson | RemoveJson | ReplaceNonfinite | PadTensor | DropTensor | RebuildIndex | SetRecipe
TENSOR_EDITS = (ReplaceNonfinite, PadTensor, DropTensor)


def pad_positions(old: int, new: int, blocks: int, spread: bool) -> np.ndarray:
    """Where each of the `old` entries lands among `new`: int64[old], strictly increasing.

    Spread places them evenly, so the longest run of zeros is as short as it can be: ceil((new - old) / old) where padding
    is less than the content.
    """
    if old % blocks or new % blocks or new < old:
        raise ValueError(f"cannot pad {old} to {new} in {blocks} blocks")
    o, n = old // blocks, new // blocks
    inside = np.arange(o, dtype=np.int64)
    if spread and o:
        inside = inside * n // o
    return (np.arange(blocks, dtype=np.int64)[:, None] * n + inside).reshape(-1)


def edited_info(info: TensorInfo, edits: list[Edit]) -> TensorInfo:
    """Name, dtype and shape of the tensor after its edits; `begin` and `end` keep their length's meaning, not their place."""
    shape = list(info.shape)
    for edit in edits:
        if isinstance(edit, PadTensor):
            shape[edit.axis] = edit.size
    numel = int(np.prod(shape, dtype=np.int64)) if shape else 1
    return replace(info, shape=tuple(shape), end=info.begin + info.dtype.nbytes(numel))


def apply(codes: np.ndarray, info: TensorInfo, edits: list[Edit]) -> np.ndarray:
    """The tensor's raw codes after its edits, in the order of PHASES. `codes` is not changed."""
    for edit in sorted(edits, key=lambda e: PHASES.index(e.phase)):
        if isinstance(edit, ReplaceNonfinite):
            codes = np.where(nonfinite_mask(codes, info.dtype.name), encode(edit.value, info.dtype.name), codes)
        elif isinstance(edit, PadTensor):
            codes = _pad(codes, edit)
    return codes


def pad_runs(old: int, new: int, blocks: int, spread: bool) -> tuple[int, list[tuple[int, int, int]]]:
    """The same places as pad_positions, as runs: (periods, [(begin, end, place in the padded period)]).

    Both axes are cut into `periods` equal parts in which the pattern repeats. Copying runs is several times as fast as
    copying by an array of positions, because most of them are long.
    """
    positions = pad_positions(old, new, blocks, spread)
    periods = math.gcd(old, new) if spread and old else blocks
    part = positions[: old // periods]
    starts = np.flatnonzero(np.diff(part, prepend=-2) != 1)
    ends = np.append(starts[1:], len(part))
    return periods, [(int(a), int(b), int(part[a])) for a, b in zip(starts, ends)]


def _pad(codes: np.ndarray, edit: PadTensor) -> np.ndarray:
    old, tail = codes.shape[edit.axis], codes.shape[edit.axis + 1 :]
    periods, runs = pad_runs(old, edit.size, edit.blocks, edit.spread)
    head = codes.shape[: edit.axis]
    out = np.zeros((*head, periods, edit.size // periods, *tail), codes.dtype)  # code 0 is +0.0 in every floating type, E8M0 apart
    parts = codes.reshape(*head, periods, old // periods, *tail)
    before = (slice(None),) * (edit.axis + 1)
    for begin, end, place in runs:
        out[(*before, slice(place, place + end - begin))] = parts[(*before, slice(begin, end))]
    return out.reshape(*head, edit.size, *tail)


_EXPONENT = {"F16": (0x7C00, 0x7FFF), "BF16": (0x7F80, 0x7FFF), "F8_E5M2": (0x7C, 0x7F)}


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


def encode(value: float, dtype_name: str) -> np.generic:
    """One raw code for a finite value. Raises ValueError for types that hold no such value."""
    if dtype_name in ("F32", "F64"):
        return np.dtype(DTYPES[dtype_name].torch).type(value)
    if dtype_name == "F16":
        return np.float16(value).view(np.uint16)
    if dtype_name == "BF16":
        return to_bf16(np.float32(value))[()]
    if value == 0 and dtype_name.startswith("F8") and dtype_name != "F8_E8M0":
        return np.uint8(0)
    raise ValueError(f"{dtype_name} has no code for {value}")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """uint16 codes of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0) | (bits >> 31).astype(np.uint16) << 15, rounded).astype(np.uint16)


def from_codes(codes: np.ndarray, dtype_name: str) -> np.ndarray:
    """float32 values of raw codes (float64 for F64). Raises ValueError for types that are not F16, BF16, F32, F64."""
    if dtype_name == "BF16":
        return (codes.astype(np.uint32) << 16).view(np.float32)
    if dtype_name == "F16":
        return codes.view(np.float16).astype(np.float32)
    if dtype_name in ("F32", "F64"):
        return codes
    raise ValueError(f"{dtype_name} is not read as values here")
