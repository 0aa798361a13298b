"""Another checkpoint to take tensors from: the base model that a fine-tune was made of, or the repository it came from.

A tensor from elsewhere is no proof by itself. What is known is where both files hold numbers: if every finite value
that is left of a broken tensor is bit-equal to the base's, the tensor was not trained, and the base's is the one that
was lost. A whole file is known to be the lost one where what is left of it is the beginning of the base's, where
git-lfs's note about it names the base's hash, or where another weight file of the two is equal.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from doctor.checkpoint.codecs import nonfinite_mask
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.json_text import split_pointer
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.edits.derived import digest
from doctor.edits.kinds import MISSING, TakeFile, TakeTensor
from doctor.model.spec import build_spec

POINTER_BYTES = 1024  # git-lfs's notes are shorter, weight files longer
COMPARE_BYTES = 1 << 20
ENOUGH = (
    16  # equal values other than 0 that are no accident: by chance two bf16 numbers agree once in thousands of times
)


@dataclass
class Base:
    """A donor for one checkpoint. `text` is what the user wrote after --from; `root` is its name in edits."""

    checkpoint: Checkpoint
    source: Checkpoint
    text: str
    _offers: dict[str, TakeTensor | None] = field(default_factory=dict)
    _equal: dict[str, tuple[bool, str]] = field(default_factory=dict)
    _filled: dict[str, str] = field(default_factory=dict)
    _files: dict[str, tuple[TakeFile, str] | None] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return getattr(self.checkpoint, "label", None) or str(self.checkpoint.root)

    @property
    def name(self) -> str:
        """What a receipt calls it: a repository and its commit, or a directory's name, never a path."""
        return getattr(self.checkpoint, "label", None) or self.checkpoint.name

    def offer_file(self, name: str) -> tuple[TakeFile, str] | None:
        """(edit that takes this whole file, what shows that it is the lost one, "" where nothing does); None where the
        base lacks it.

        A weight file is offered only where the base's own can be read without a fault.
        """
        if name not in self._files:
            self._files[name] = self._offer_file(name)
        return self._files[name]

    def _offer_file(self, name: str) -> tuple[TakeFile, str] | None:
        donor = self.checkpoint
        shard = donor.shards.get(name)
        if name not in donor.entries or (
            name.endswith(".safetensors") and (shard is None or shard.defects or not shard.tensors)
        ):
            return None
        if name.endswith(".json") and (name not in donor.json or donor.json[name].broken is not None):
            return None
        sha256 = donor.sha256(name)
        try:
            return TakeFile(name, self.root, sha256), self._shown(name, sha256)
        except (BadCheckpoint, OSError):  # what is left here cannot be read, so it shows nothing
            return TakeFile(name, self.root, sha256), ""

    def _shown(self, name: str, sha256: str) -> str:
        """Why the base's file is the one that was lost here, "" where nothing shows it."""
        if name in self.source.entries and self.source.entries[name].size < POINTER_BYTES:
            pointer = self.source.read_file(name, POINTER_BYTES)
            if pointer.startswith(b"version https://git-lfs"):
                return (
                    "its hash is the one that the pointer names" if f"oid sha256:{sha256}".encode() in pointer else ""
                )
        return self._sibling(name) or self._beginning(name) if name.endswith(".safetensors") else ""

    def _sibling(self, lost: str) -> str:
        """Another shard that both have whole, the smallest: where it is equal, the two are one model."""
        mine, theirs = self.source, self.checkpoint
        both = [n for n, s in mine.shards.items() if n != lost and n in theirs.shards and not s.defects and s.tensors]
        for other in sorted(both, key=lambda n: mine.entries[n].size)[:1]:
            if mine.entries[other].size == theirs.entries[other].size and mine.sha256(other) == theirs.sha256(other):
                return f"{other} has the same sha256 in both"
        return ""

    def _beginning(self, name: str) -> str:
        """What is left of a file that was cut short, if it is the first part of the base's and reaches into its
        values.
        """
        if name not in self.source.entries:
            return ""
        size, begin = self.source.entries[name].size, self.checkpoint.shards[name].data_begin
        if not begin + ENOUGH <= size < self.checkpoint.entries[name].size:
            return ""
        with open(self.source.path(name), "rb") as mine, open(self.checkpoint.path(name), "rb") as theirs:
            for at in range(0, size, COMPARE_BYTES):
                count = min(COMPARE_BYTES, size - at)
                if os.pread(mine.fileno(), count, at) != os.pread(theirs.fileno(), count, at):
                    return ""
        return f"the {size:,} bytes that are left are its first"

    def offer(self, name: str, dtype: str, shape: tuple[int, ...]) -> TakeTensor | None:
        """The edit that takes this tensor; None where the base lacks it in this type and shape, or its own is not
        finite.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None or (info.dtype.name, info.shape) != (dtype, tuple(shape)) or self.checkpoint.unread:
            return None
        if name not in self._offers:
            whole = all(not nonfinite_mask(rows, dtype).any() for rows in self.checkpoint.rows(name))
            self._offers[name] = TakeTensor(name, self.root, digest(self.checkpoint, info)) if whole else None
        return self._offers[name]

    def value(self, file: str, pointer: str) -> object:
        """What the base's JSON file has at this place, MISSING where it has nothing."""
        value = self.checkpoint.value(file)
        for key in split_pointer(pointer):
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        return MISSING if value is None else value

    def ties(self) -> bool | None:
        """Whether the base has one matrix for embedding and head; None where its files do not say it twice, by flag and
        by tensors.
        """
        config = self.checkpoint.value("config.json") or {}
        flags = {b.get("tie_word_embeddings") for b in (config, config.get("text_config")) if isinstance(b, dict)} - {
            None
        }
        stored = any(n.endswith("lm_head.weight") for n in self.checkpoint.tensors)
        if flags == {True} and not stored:
            return True
        return False if stored and True not in flags else None

    def is_tied(self, name: str) -> bool:
        """Whether this tensor is the base's embedding and its head in one."""
        config = self.checkpoint.value("config.json")
        spec = build_spec(config, self.checkpoint.tensors) if config else None
        return spec is not None and spec.tied and name == spec.embed_tensor

    def agrees(self, info: TensorInfo) -> tuple[bool, str]:
        """(whether all finite values of this tensor are the base's, bit by bit, and enough of them; what was found)."""
        if info.name not in self._equal:
            self._equal[info.name] = self._compare(info)
        return self._equal[info.name]

    def fills(self, info: TensorInfo) -> str:
        """What was found where every value of this tensor that is not 0 is the base's, bit by bit, and the base has
        numbers where it is 0; else "".
        """
        if info.name not in self._filled:
            self._filled[info.name] = self._fill(info)
        return self._filled[info.name]

    def _fill(self, info: TensorInfo) -> str:
        left = filled = 0
        for ours, theirs in zip(self.source.rows(info.name), self.checkpoint.rows(info.name), strict=True):
            kind = f"u{ours.itemsize}"
            bits, others = ours.view(kind), theirs.view(kind)
            zero = (bits << np.array(1, bits.dtype)) == 0  # of either sign
            if ((bits != others) & ~zero).any():
                return ""
            left += int((~zero).sum())
            filled += int((zero & ((others << np.array(1, bits.dtype)) != 0)).sum())
        return (
            f"its other {left:,} values are equal, and {filled:,} are 0 only here" if left >= ENOUGH and filled else ""
        )

    def begins(self, info: TensorInfo, axis: int, blocks: int = 1) -> bool:
        """Whether this tensor is the first part of the base's along one axis, bit by bit; of each of `blocks` equal
        parts of it.
        """
        theirs = self.checkpoint.tensors.get(info.name)
        if theirs is None or theirs.dtype != info.dtype or len(theirs.shape) != len(info.shape):
            return False
        old, new = info.shape[axis], theirs.shape[axis]
        if (
            old > new
            or old % blocks
            or new % blocks
            or info.shape != (*theirs.shape[:axis], old, *theirs.shape[axis + 1 :])
        ):
            return False
        split = lambda codes, size: codes.reshape(*codes.shape[:axis], blocks, size // blocks, *codes.shape[axis + 1 :])  # noqa: E731
        whole = split(self.checkpoint.load(info.name), new)
        ours = split(self.source.load(info.name), old)
        part = whole[(slice(None),) * (axis + 1) + (slice(old // blocks),)]
        kind = f"u{ours.itemsize}"
        return bool((ours.view(kind) == np.ascontiguousarray(part).view(kind)).all())

    def _compare(self, info: TensorInfo) -> tuple[bool, str]:
        compared = different = telling = 0
        for ours, theirs in zip(self.source.rows(info.name), self.checkpoint.rows(info.name), strict=True):
            finite = ~nonfinite_mask(ours, info.dtype.name)
            kind = f"u{ours.itemsize}"  # -0.0 is not 0.0, and floats are compared as bits
            equal = ours.view(kind) == theirs.view(kind)
            compared += int(finite.sum())
            different += int((finite & ~equal).sum())
            telling += int((finite & equal & (ours.view(kind) != np.uint8(0))).sum())
        if different:
            return False, f"{different:,} of its {compared:,} finite values differ from this tensor's"
        return telling >= ENOUGH, f"all {compared:,} finite values that are left agree with it"
