"""The closed set of edits: values that say what a fix changes.

An edit is data and never touches disk. `overlay.EditedCheckpoint` reads a checkpoint through edits, `fixing.plan`
composes them, `fixing.staging` writes the overlay; so `quantize --fix` and `fix -o` run the same code. The same edit
twice counts once; two different edits of one target are refused. Receipts name an edit by its class and its fields, so
neither is ever renamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Edits are applied in this order.
PHASES = ("base", "bytes", "dtype", "shape", "names", "config", "files", "index", "recipe")


class Missing:
    """Type of MISSING, which stands for "the key is absent" in `expect`."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()


# What edits are about


@dataclass(frozen=True)
class FileEdit:
    """An edit of one file, named as in the source."""

    file: str
    phase = "files"

    @property
    def target(self) -> str:
        return f"file:{self.file}"


@dataclass(frozen=True)
class TensorEdit:
    """An edit of one tensor, named as in the source; by default of its values."""

    tensor: str
    phase = "bytes"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:values"


# JSON and text


@dataclass(frozen=True)
class SetJson(FileEdit):
    """Set one value of a JSON file and leave the rest of its text. `expect` is the present value (MISSING: none)."""

    pointer: str
    value: object
    expect: object = MISSING
    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}#{self.pointer}"


@dataclass(frozen=True)
class RemoveJson(FileEdit):
    """Remove one key of a JSON file. `expect` is the present value; None accepts any."""

    pointer: str
    expect: object = None
    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}#{self.pointer}"


@dataclass(frozen=True)
class ReplaceText(FileEdit):
    """Replace the first occurrence of `old` by `new` in a text file that is not JSON."""

    old: str
    new: str

    @property
    def target(self) -> str:
        return f"{self.file}:text"


@dataclass(frozen=True)
class CleanJson(FileEdit):
    """Remove what Python's reader refuses or ignores in a JSON file: a byte order mark, and all but the last value of a
    key.
    """

    phase = "config"

    @property
    def target(self) -> str:
        return f"{self.file}:text"


# Values of a tensor


@dataclass(frozen=True)
class ReplaceNonfinite(TensorEdit):
    """NaN and ±Inf of one tensor become `value`. Never part of a blanket fix: it invents weights."""

    value: float = 0.0


@dataclass(frozen=True)
class ClampTensor(TensorEdit):
    """Values beyond ±limit become ±limit; NaN and Inf stay. Never part of a blanket fix: it changes weights."""

    limit: float


@dataclass(frozen=True)
class CastTensor(TensorEdit):
    """Store one tensor in another float dtype, rounded once to nearest. Refused where a finite value would become
    Inf.
    """

    dtype: str
    phase = "dtype"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:dtype"


@dataclass(frozen=True)
class TakeTensor(TensorEdit):
    """Copy the tensor from a donor checkpoint, in place of this one's or where it is absent.

    root: the donor (donor_registry.open_donor); digest: blake2b (16 bytes, hexadecimal) of the tensor's bytes there;
    called: its name there, "" for the same name.
    """

    root: str
    digest: str
    called: str = ""


@dataclass(frozen=True)
class Dequantize(TensorEdit):
    """`tensor` [out_features, in_features] as float values, from the packed tensors beside it, which other edits drop;
    of fused experts [experts, …].

    method: the name of the format (doctor/formats). version: 2 for GPTQ v2 in receipts that call it gptq. block: rows
    and columns that share a scale, () where the scale's own shape determines it.
    """

    shape: tuple[int, ...]
    method: str
    bits: int = 4
    version: int = 1
    block: tuple[int, ...] = ()
    dtype: str = "BF16"


@dataclass(frozen=True)
class Repack(TensorEdit):
    """`tensor`, one part of a linear packed by the format `to`, from the parts that the format `method` packed beside
    it: the same codes under the same scales and zero points.

    part: the last part of its name; dtype and size: its own. shape: [out_features, in_features] of the weight. sym: the
    written grid is symmetric, so every zero point must be the middle.
    """

    method: str
    to: str
    part: str
    dtype: str
    size: tuple[int, ...]
    shape: tuple[int, int]
    bits: int = 4
    group_size: int = -1
    sym: bool = True


@dataclass(frozen=True)
class AddLowRank(TensorEdit):
    """weight + scale * B @ A, in float32, rounded once. `a` [r, in] and `b` [out, r] are tensors of the adapter in
    `root`.

    transposed: the weight is stored [in, out]. magnitude: DoRA's [out], the norm of each row of the result; "" without.
    Needs a Rebase on the model that the adapter was trained on.
    """

    root: str
    a: str
    b: str
    scale: float
    transposed: bool = False
    magnitude: str = ""


@dataclass(frozen=True)
class ShiftZeros(TensorEdit):
    """Add `step` to GPTQ's packed zero points (version 1 stores them minus one). Refused where a field would wrap."""

    bits: int
    step: int


@dataclass(frozen=True)
class GroupsInOrder(TensorEdit):
    """g_idx of contiguous groups, i // group_size, as GPTQ readers expect it; created where it is absent."""

    in_features: int
    group_size: int


@dataclass(frozen=True)
class EqualZeros(TensorEdit):
    """Zero points i32[groups, words], every word equal to `word`, as in a symmetric GPTQ file; created where absent."""

    shape: tuple[int, int]
    word: int


# Shape, name and presence of a tensor


@dataclass(frozen=True)
class PadTensor(TensorEdit):
    """Extend one axis to `size` with zeros. The axis has `blocks` equal parts, extended alike (fused halves, head
    groups).

    spread: zeros are spread evenly between the values, so that no group of neighbours is all zero; else they follow
    each part.
    """

    axis: int
    size: int
    blocks: int = 1
    spread: bool = True
    phase = "shape"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:axis{self.axis}"


@dataclass(frozen=True)
class GrowRows(TensorEdit):
    """Append rows up to `size`, each the mean of the present ones: its logit is the mean of all logits, so never the
    largest.
    """

    size: int
    phase = "shape"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:axis0"


@dataclass(frozen=True)
class DropTensor(TensorEdit):
    """Leave one tensor out. shard: of a tensor stored in several files only the copy in this one; "" drops all."""

    shard: str = ""
    phase = "names"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:name" + (f" in {self.shard}" if self.shard else "")


@dataclass(frozen=True)
class RenameTensor(TensorEdit):
    """Store one tensor under another name; its bytes stay."""

    to: str
    phase = "names"

    @property
    def target(self) -> str:
        return f"tensor:{self.tensor}:name"


# Files


@dataclass(frozen=True)
class TakeFile(FileEdit):
    """Copy one whole file from a donor checkpoint, in place of this one's or where it is absent.

    root: the donor (donor_registry.open_donor); sha256: of the file there, in hexadecimal. The written file must match
    it.
    """

    root: str
    sha256: str
    phase = "base"


@dataclass(frozen=True)
class NameFormat(FileEdit):
    """Write a shard again with a header whose metadata names the format, as every written shard gets it."""

    @property
    def target(self) -> str:
        return f"file:{self.file}:format"


@dataclass(frozen=True)
class RenameFile(FileEdit):
    """Rename one weight file; it is linked, not copied, and the index follows. Other edits use its old name."""

    to: str
    phase = "base"

    @property
    def target(self) -> str:
        return f"file:{self.file}:name"


@dataclass(frozen=True)
class DropFile(FileEdit):
    """Leave one file out."""


@dataclass(frozen=True)
class Rebase:
    """Use the files of the checkpoint in `root` instead: a merged adapter is its base model, changed."""

    root: str
    phase = "base"
    target = "base"


@dataclass(frozen=True)
class DecodeGguf:
    """Read the GGUF model in `file` as the plain checkpoint that transformers computes with, its tensors in `dtype`."""

    file: str
    dtype: str
    phase = "base"
    target = "base"


@dataclass(frozen=True)
class RebuildIndex:
    """Write model.safetensors.index.json from the headers of the shards."""

    phase = "index"
    target = "index"


# The recipe


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
    """Leave the linears of a pattern in 16 bits, beside those that the recipe ignores already (recipe.is_kept)."""

    pattern: str
    phase = "recipe"

    @property
    def target(self) -> str:
        return f"recipe:keep:{self.pattern}"


# fmt: off
Edit = (
    SetJson | RemoveJson | ReplaceText | CleanJson | ReplaceNonfinite | ClampTensor | CastTensor | TakeTensor | TakeFile
    | Dequantize | Repack | AddLowRank | GrowRows | ShiftZeros | GroupsInOrder | EqualZeros | PadTensor | DropTensor
    | RenameTensor | NameFormat | RenameFile | DropFile | Rebase | DecodeGguf | RebuildIndex | SetRecipe | Keep
)
# fmt: on
# Computed by derived.py: they need more than the codes of the tensor itself.
DERIVED = (TakeTensor, Dequantize, Repack, AddLowRank, GrowRows, GroupsInOrder, EqualZeros)
CREATING = (TakeTensor, Dequantize, Repack, GroupsInOrder, EqualZeros)  # may create a tensor that is absent
RECIPE_EDITS = (SetRecipe, Keep)  # change how a run quantizes, never the files
