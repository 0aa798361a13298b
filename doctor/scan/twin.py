"""Two tensors of one checkpoint, byte by byte, while one of them is read."""

from __future__ import annotations

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo


class Twin:
    """The tensor whose bytes another's are compared with while those are read; nothing of it is read past the first
    difference.

    same: whether they are equal so far; None where there is nothing to compare with.
    """

    def __init__(self, checkpoint: Checkpoint, info: TensorInfo, name: str | None):
        self.same = None
        if name is not None and checkpoint.tensors.get(info.name) is info:
            other = checkpoint.tensors[name]
            self.same = (other.dtype, other.shape) == (info.dtype, info.shape)
            self._file, self._at = checkpoint.open_file(other.shard), other.begin

    def compare(self, part: memoryview) -> None:
        if self.same:
            raw = bytearray(len(part))
            self._file.read_into(self._at, memoryview(raw))
            self._at += len(part)
            self.same = raw == part

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, *_) -> None:
        if self.same is not None:
            self._file.close()
