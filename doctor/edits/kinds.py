"""The closed set of edits: values that say what a cure changes, and the array arithmetic that carries them out.

An edit never touches disk. `checkpoint view` (view.py) reads through them, `plan` composes them, `writer` materialises
the view; so `quantize --fix` and `fix -o` run the same code. The same edit twice is once; two different edits on one
target are refused by the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from doctor.checkpoint.codecs import encode, from_codes, nonfinite_mask, to_codes
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import PlanRefused
from doctor.core.lazy_numpy import np

PHASES = ("base", "bytes", "dtype", "shape", "names", "config", "files", "index", "recipe")


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
class ReplaceText:
    """The first occurrence of `old` in a text file that is no JSON becomes `new`."""

    file: str
    old: str
    new: str
    phase = "files"

    @property
    def target(self) -> str:
        return f"{self.file}:text"


@dataclass(frozen=True)
class CleanJson:
    """Take what Python's reader refuses or passes over out of a JSON file: a byte order mark, and all but the last
    value of a key.
    """

    file: str
    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}:text"


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
    """Grow one axis to `size` with zeros. The axis is `blocks` equal parts, each grown alike (fused halves, head
    groups).

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
class ClampTensor:
    """Values beyond ±limit become ±limit, NaN and Inf stay. Never part of a blanket fix: it changes weights."""

    tensor: str
    limit: float
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class DropTensor:
    """Leave one tensor out. shard: of a tensor that stands in several files only the copy in this one; "" drops all."""

    tensor: str
    shard: str = ""
    phase = "names"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:name" + (f" in {self.shard}" if self.shard else "")


@dataclass(frozen=True)
class RenameTensor:
    """Store one tensor under another name, its bytes untouched."""

    tensor: str
    to: str
    phase = "names"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:name"


@dataclass(frozen=True)
class NameFormat:
    """Write a shard anew with a header whose metadata names the format, as every shard that is written gets it."""

    file: str
    phase = "files"

    @property
    def target(self) -> str:
        return f"file:{self.file}:format"


@dataclass(frozen=True)
class RenameFile:
    """Keep one weight file under another name, linked and not written again; the index follows. Other edits go by its
    old name.
    """

    file: str
    to: str
    phase = "base"

    @property
    def target(self) -> str:
        return f"file:{self.file}:name"


@dataclass(frozen=True)
class CastTensor:
    """Store one tensor in another floating type, rounded once to nearest. One that would turn a finite value into Inf
    is refused.
    """

    tensor: str
    dtype: str
    phase = "dtype"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:dtype"


@dataclass(frozen=True)
class TakeTensor:
    """The tensor as another checkpoint holds it, in place of this one's or where there is none.

    root: directory of the other checkpoint; digest: blake2b (16 bytes, hexadecimal) of the tensor's bytes there;
    called: its name there, "" where it is the same.
    """

    tensor: str
    root: str
    digest: str
    called: str = ""
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class TakeFile:
    """One whole file as another checkpoint holds it, in place of this one's or where there is none.

    root: the other checkpoint (made.opened); sha256: of the file there, in hexadecimal. What is written must have it.
    """

    file: str
    root: str
    sha256: str
    phase = "base"

    @property
    def target(self) -> str:
        return f"file:{self.file}"


@dataclass(frozen=True)
class Dequantize:
    """`tensor` [out_features, in_features] as plain numbers, made of the packed tensors beside it, which other edits
    drop.

    method: gptq, awq, compressed-tensors or fp8. version: of GPTQ's zero points. block: rows and columns that share an
    fp8 scale, () where a scale's own shape says it.
    """

    tensor: str
    shape: tuple[int, int]
    method: str
    bits: int = 4
    version: int = 1
    block: tuple[int, ...] = ()
    dtype: str = "BF16"
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class AddLowRank:
    """weight + scale * B @ A, in float32, rounded once. `a` [r, in] and `b` [out, r] are tensors of the adapter in
    `root`.

    transposed: the weight is stored [in, out]. magnitude: DoRA's [out], to which each output's row of the sum is
    brought, "" without. Needs a Rebase on the model that the adapter changes.
    """

    tensor: str
    root: str
    a: str
    b: str
    scale: float
    transposed: bool = False
    magnitude: str = ""
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class GrowRows:
    """Rows up to `size`, each the mean of those that are there: its logit is the mean of all logits, so it is never the
    largest.
    """

    tensor: str
    size: int
    phase = "shape"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:axis0"


@dataclass(frozen=True)
class ShiftZeros:
    """GPTQ's packed zero points moved by `step` (version 1 stores them minus one). A field that would leave its bits is
    refused.
    """

    tensor: str
    bits: int
    step: int
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class GroupsInOrder:
    """g_idx of groups of neighbours, i // group_size, as GPTQ's readers want it; made where there is none."""

    tensor: str
    in_features: int
    group_size: int
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class EqualZeros:
    """Zero points i32[groups, words], every word `word`: what a symmetric GPTQ file holds. Made where there are
    none.
    """

    tensor: str
    shape: tuple[int, int]
    word: int
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


@dataclass(frozen=True)
class DropFile:
    """Leave one file out."""

    file: str
    phase = "files"

    @property
    def target(self) -> str:
        return f"file:{self.file}"


@dataclass(frozen=True)
class Rebase:
    """The files of the checkpoint in `root` instead of these: what an adapter becomes is its base model, changed."""

    root: str
    phase = "base"
    target = "base"


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


@dataclass(frozen=True)
class Keep:
    """Leave the linears of a pattern in 16 bits, beside those that the recipe keeps already (recipe.is_kept)."""

    pattern: str
    phase = "recipe"

    @property
    def target(self) -> str:
        return f"recipe:keep:{self.pattern}"


Edit = (
    SetJson
    | RemoveJson
    | ReplaceText
    | CleanJson
    | ReplaceNonfinite
    | ClampTensor
    | CastTensor
    | TakeTensor
    | TakeFile
    | Dequantize
    | AddLowRank
    | GrowRows
    | ShiftZeros
    | GroupsInOrder
    | EqualZeros
    | PadTensor
    | DropTensor
    | RenameTensor
    | NameFormat
    | RenameFile
    | DropFile
    | Rebase
    | RebuildIndex
    | SetRecipe
    | Keep
)
MADE = (
    TakeTensor,
    Dequantize,
    AddLowRank,
    GrowRows,
    GroupsInOrder,
    EqualZeros,
)  # carried out by made.py: they need more than the tensor's own codes
CREATE = (TakeTensor, Dequantize, GroupsInOrder, EqualZeros)  # may stand for a tensor that is not there
TENSOR_EDITS = (ReplaceNonfinite, ClampTensor, CastTensor, ShiftZeros, PadTensor, DropTensor, RenameTensor, *MADE)
RECIPE_EDITS = (SetRecipe, Keep)  # change the plan of a quantizer's run, never the files


def pad_positions(old: int, new: int, blocks: int, spread: bool) -> np.ndarray:
    """Where each of the `old` entries lands among `new`: int64[old], strictly increasing.

    Spread places them evenly, so the longest run of zeros is as short as it can be: ceil((new - old) / old) where
    padding is less than the content.
    """
    if old % blocks or new % blocks or new < old:
        raise ValueError(f"cannot pad {old} to {new} in {blocks} blocks")
    o, n = old // blocks, new // blocks
    inside = np.arange(o, dtype=np.int64)
    if spread and o:
        inside = inside * n // o
    return (np.arange(blocks, dtype=np.int64)[:, None] * n + inside).reshape(-1)


def edited_info(info: TensorInfo, edits: list[Edit]) -> TensorInfo:
    """Name, dtype and shape of the tensor after its edits; `begin` and `end` keep their length's meaning, not their
    place.
    """
    shape, dtype = list(info.shape), info.dtype
    for edit in edits:
        if isinstance(edit, PadTensor):
            shape[edit.axis] = edit.size
        elif isinstance(edit, CastTensor):
            dtype = DTYPES[edit.dtype]
        elif isinstance(edit, RenameTensor):
            info = info._replace(name=edit.to)
    numel = int(np.prod(shape, dtype=np.int64)) if shape else 1
    return info._replace(shape=tuple(shape), dtype=dtype, end=info.begin + dtype.nbytes(numel))


def apply(codes: np.ndarray, info: TensorInfo, edits: list[Edit]) -> np.ndarray:
    """The tensor's raw codes after its edits, in the order of PHASES. `codes` is not changed."""
    for edit in sorted(edits, key=lambda e: PHASES.index(e.phase)):
        if isinstance(edit, ReplaceNonfinite):
            codes = np.where(nonfinite_mask(codes, info.dtype.name), encode(edit.value, info.dtype.name), codes)
        elif isinstance(edit, ClampTensor):
            codes = clamp(codes, info.dtype.name, edit.limit)
        elif isinstance(edit, CastTensor):
            codes = cast(codes, info.dtype.name, edit.dtype, info.name)
        elif isinstance(edit, ShiftZeros):
            codes = shift_fields(codes, edit.bits, edit.step, info.name)
        elif isinstance(edit, PadTensor):
            codes = _pad(codes, edit)
    return codes


CASTS = ("F16", "BF16", "F32")


def widens(old: str, new: str) -> bool:
    """Whether every value of one type is a value of the other, so that a cast changes nothing."""
    return old == new or (old in ("F16", "BF16") and new == "F32")


def cast(codes: np.ndarray, old: str, new: str, name: str) -> np.ndarray:
    """Codes of the same values in another type. Raises PlanRefused where finite values would become Inf."""
    values = from_codes(codes, old)
    result = to_codes(values, new)
    lost = nonfinite_mask(result, new) & np.isfinite(values)
    if lost.any():
        worst = float(np.abs(values[lost]).max())
        raise PlanRefused(
            f"{name}: {int(lost.sum()):,} finite values, up to {worst:.6g}, are beyond {new}; a cast would make them Inf.",
            "Keep its type, or leave this fix out with --ignore.",
        )
    return result


def clamp(codes: np.ndarray, dtype_name: str, limit: float) -> np.ndarray:
    """Codes whose finite values beyond ±limit are the largest code within it; all others are as they were."""
    values = from_codes(codes, dtype_name)
    beyond = np.isfinite(values) & (np.abs(values) > limit)
    if not beyond.any():
        return codes
    top = to_codes(np.array([limit], np.float32), dtype_name)
    if from_codes(top, dtype_name)[0] > limit:  # rounded up: one code less is the next smaller value
        top = (top.view(f"u{top.itemsize}") - np.array([1], f"u{top.itemsize}")).view(top.dtype)
    within = from_codes(top, dtype_name)[0]
    return np.where(beyond, to_codes(np.where(values < 0, -within, within).astype(np.float32), dtype_name), codes)


def shift_fields(words: np.ndarray, bits: int, step: int, name: str) -> np.ndarray:
    """int32 words with `step` (1 or -1) added to each field of `bits`, for widths that divide 32. Raises PlanRefused
    where one wraps.
    """
    fields, top = words.view(np.uint32), (1 << bits) - 1
    edge = top if step > 0 else 0
    full = sum(int(((fields >> shift) & top == edge).sum()) for shift in range(0, 32, bits))
    if full:
        raise PlanRefused(
            f"{name}: {full:,} zero points are {edge} and cannot move by {step:+d} in {bits} bits.",
            "Quantize this linear again.",
        )
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return (fields + ones if step > 0 else fields - ones).view(np.int32)


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
    out = np.zeros(
        (*head, periods, edit.size // periods, *tail), codes.dtype
    )  # code 0 is +0.0 in every floating type, E8M0 apart
    parts = codes.reshape(*head, periods, old // periods, *tail)
    before = (slice(None),) * (edit.axis + 1)
    for begin, end, place in runs:
        out[(*before, slice(place, place + end - begin))] = parts[(*before, slice(begin, end))]
    return out.reshape(*head, edit.size, *tail)
