"""The donor of `--from`: another checkpoint to copy tensors and files from, a fine-tune's base model or its repository.

A tensor from elsewhere proves nothing by itself; what both files hold does. Where every finite value left of a broken
tensor is bit-equal to the donor's, the tensor was not trained, and the donor's is the one that was lost. A whole file
is known to be the lost one where what is left of it is the beginning of the donor's, where its Git LFS pointer names
the donor's hash, or where another weight file is equal in both.
"""

import os
from dataclasses import dataclass, field

import numpy as np

from doctor.checkpoint.codecs import nonfinite_mask
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.json_text import split_pointer
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import Message, _
from doctor.edits.donor_registry import tensor_digest
from doctor.edits.kinds import MISSING, TakeFile, TakeTensor
from doctor.model.spec import build_spec

POINTER_BYTES = 1024  # a Git LFS pointer is shorter, a weight file longer
COMPARE_BYTES = 1 << 20
# This many equal values other than 0 are no accident: two bf16 values agree by chance once in thousands of times.
ENOUGH = 16


@dataclass
class Donor:
    """A donor for one checkpoint. `text` is what the user wrote after --from; `root` is its name in edits."""

    checkpoint: Checkpoint
    source: Checkpoint
    text: str
    _offers: dict[str, TakeTensor | None] = field(default_factory=dict)
    _equal: dict[str, tuple[bool, Message]] = field(default_factory=dict)
    _filled: dict[str, str] = field(default_factory=dict)
    _files: dict[str, tuple[TakeFile, str] | None] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return getattr(self.checkpoint, "label", None) or str(self.checkpoint.root)

    @property
    def name(self) -> str:
        """Its name in a receipt: a repository and its commit, or a directory's name, never a path."""
        return getattr(self.checkpoint, "label", None) or self.checkpoint.name

    def offer_file(self, name: str) -> tuple[TakeFile, str] | None:
        """(edit that copies this whole file, evidence that it is the lost one, "" for none); None where the donor lacks
        it.

        A weight file is offered only where the donor's own is readable without a defect.
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
            return TakeFile(name, self.root, sha256), self._evidence(name, sha256)
        except (BadCheckpoint, OSError):  # what is left here is unreadable, so it proves nothing
            return TakeFile(name, self.root, sha256), ""

    def _evidence(self, name: str, sha256: str) -> str:
        """Why the donor's file is the one that was lost here, "" where nothing shows it."""
        if name in self.source.entries and self.source.entries[name].size < POINTER_BYTES:
            pointer = self.source.read_file(name, POINTER_BYTES)
            if pointer.startswith(b"version https://git-lfs"):
                named = f"oid sha256:{sha256}".encode() in pointer
                return _("its hash is the one that the pointer names") if named else ""
        return self._sibling(name) or self._beginning(name) if name.endswith(".safetensors") else ""

    def _sibling(self, lost: str) -> str:
        """The smallest other shard that both have whole: where it is equal, both are the same model."""
        mine, theirs = self.source, self.checkpoint
        both = [n for n, s in mine.shards.items() if n != lost and n in theirs.shards and not s.defects and s.tensors]
        for other in sorted(both, key=lambda n: mine.entries[n].size)[:1]:
            if mine.entries[other].size == theirs.entries[other].size and mine.sha256(other) == theirs.sha256(other):
                return _("{file} has the same sha256 in both", file=other)
        return ""

    def _beginning(self, name: str) -> str:
        """Whether what is left of a truncated file is the first part of the donor's and reaches into its values."""
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
        return _("the {count:,} bytes that are left are its first", count=size)

    def offer(self, name: str, dtype: str, shape: tuple[int, ...]) -> TakeTensor | None:
        """The edit that copies this tensor; None where the donor lacks it in this dtype and shape, or its own is not
        finite.
        """
        info = self.checkpoint.tensors.get(name)
        if info is None or (info.dtype.name, info.shape) != (dtype, tuple(shape)) or self.checkpoint.unread:
            return None
        if name not in self._offers:
            whole = all(not nonfinite_mask(rows, dtype).any() for rows in self.checkpoint.rows(name))
            self._offers[name] = TakeTensor(name, self.root, tensor_digest(self.checkpoint, info)) if whole else None
        return self._offers[name]

    def value(self, file: str, pointer: str) -> object:
        """The value of the donor's JSON file at this pointer, MISSING for none or null."""
        value: object = self.checkpoint.value(file)
        for key in split_pointer(pointer):
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        return MISSING if value is None else value

    def ties(self) -> bool | None:
        """Whether the donor ties head and embedding; None where flag and tensors do not agree on it."""
        config = self.checkpoint.value("config.json") or {}
        flags = {b.get("tie_word_embeddings") for b in (config, config.get("text_config")) if isinstance(b, dict)} - {
            None
        }
        stored = any(n.endswith("lm_head.weight") for n in self.checkpoint.tensors)
        if flags == {True} and not stored:
            return True
        return False if stored and True not in flags else None

    def is_tied(self, name: str) -> bool:
        """Whether this tensor is both embedding and head of the donor."""
        config = self.checkpoint.value("config.json")
        spec = build_spec(config, self.checkpoint.tensors) if config else None
        return spec is not None and spec.tied and name == spec.embed_tensor

    def agrees(self, info: TensorInfo) -> tuple[bool, Message]:
        """(whether all finite values of this tensor, and enough of them, are bit-equal to the donor's; what was
        found).
        """
        if info.name not in self._equal:
            self._equal[info.name] = self._compare(info)
        return self._equal[info.name]

    def fills(self, info: TensorInfo) -> str:
        """The evidence where every value of this tensor but zeros is bit-equal to the donor's, which has values there;
        else "".
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
        if left < ENOUGH or not filled:
            return ""
        return _("its other {left:,} values are equal, and {filled:,} are 0 only here", left=left, filled=filled)

    def begins(self, info: TensorInfo, axis: int, blocks: int = 1) -> bool:
        """Whether this tensor is bit-equal to the first part of the donor's along one axis, in each of `blocks` equal
        parts.
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

        def split(codes: np.ndarray, size: int) -> np.ndarray:
            return codes.reshape(*codes.shape[:axis], blocks, size // blocks, *codes.shape[axis + 1 :])

        whole = split(self.checkpoint.load(info.name), new)
        ours = split(self.source.load(info.name), old)
        part = whole[(slice(None),) * (axis + 1) + (slice(old // blocks),)]
        kind = f"u{ours.itemsize}"
        return bool((ours.view(kind) == np.ascontiguousarray(part).view(kind)).all())

    def _compare(self, info: TensorInfo) -> tuple[bool, Message]:
        compared = different = nonzero = 0
        for ours, theirs in zip(self.source.rows(info.name), self.checkpoint.rows(info.name), strict=True):
            finite = ~nonfinite_mask(ours, info.dtype.name)
            kind = f"u{ours.itemsize}"  # -0.0 is not 0.0, and floats are compared as bits
            equal = ours.view(kind) == theirs.view(kind)
            compared += int(finite.sum())
            different += int((finite & ~equal).sum())
            nonzero += int((finite & equal & (ours.view(kind) != np.uint8(0))).sum())
        if different:
            return False, _(
                "{different:,} of its {count:,} finite values differ from this tensor's",
                different=different,
                count=compared,
            )
        return nonzero >= ENOUGH, _("all {count:,} finite values that are left agree with it", count=compared)
