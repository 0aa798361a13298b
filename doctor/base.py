"""Another checkpoint to take tensors from: the base model that a fine-tune was made of, or the repository it came from.

A tensor from elsewhere is no proof by itself. What is known is where both files hold numbers: if every finite value that is
left of a broken tensor is bit-equal to the base's, the tensor was not trained, and the base's is the one that was lost.
"""

from dataclasses import dataclass, field

import numpy as np

from doctor.checkpoint import Checkpoint
from doctor.edits import TakeTensor, nonfinite_mask
from doctor.made import digest
from doctor.shard import TensorInfo

ENOUGH = 16  # equal values other than 0 that are no accident: by chance two bf16 numbers agree once in thousands of times


@dataclass
class Base:
    """A donor for one checkpoint. `text` is what the user wrote after --from."""

    checkpoint: Checkpoint
    source: Checkpoint
    text: str
    _offers: dict[str, TakeTensor | None] = field(default_factory=dict)
    _equal: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def offer(self, name: str, dtype: str, shape: tuple[int, ...]) -> TakeTensor | None:
        """The edit that takes this tensor; None where the base lacks it in this type and shape, or its own is not finite."""
        info = self.checkpoint.tensors.get(name)
        if info is None or (info.dtype.name, info.shape) != (dtype, tuple(shape)) or self.checkpoint.unread:
            return None
        if name not in self._offers:
            whole = all(not nonfinite_mask(rows, dtype).any() for rows in self.checkpoint.rows(name))
            self._offers[name] = TakeTensor(name, str(self.checkpoint.root), digest(self.checkpoint, info)) if whole else None
        return self._offers[name]

    def ties(self) -> bool | None:
        """Whether the base has one matrix for embedding and head; None where its files do not say it twice, by flag and by tensors."""
        config = self.checkpoint.value("config.json") or {}
        flags = {b.get("tie_word_embeddings") for b in (config, config.get("text_config")) if isinstance(b, dict)} - {None}
        stored = any(n.endswith("lm_head.weight") for n in self.checkpoint.tensors)
        if flags == {True} and not stored:
            return True
        return False if stored and True not in flags else None

    def agrees(self, info: TensorInfo) -> tuple[bool, str]:
        """(whether all finite values of this tensor are the base's, bit by bit, and enough of them; what was found)."""
        if info.name not in self._equal:
            self._equal[info.name] = self._compare(info)
        return self._equal[info.name]

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
