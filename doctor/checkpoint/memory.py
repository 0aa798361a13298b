"""Tensors that a program holds, seen as a checkpoint: one shard that is never written.

Scan and rules take it like any other. What only files can answer (an index, a tokenizer, a header) is not judged, and
the report says so.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from doctor.checkpoint.directory import Checkpoint, JsonFile
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _

SHARD = "memory"


class HeldTensor(NamedTuple):
    """dtype: a safetensors name. raw: gives its bytes in C order, u8[nbytes]; called once or more, from any thread."""

    dtype: str
    shape: tuple[int, ...]
    raw: Callable[[], np.ndarray]


class MemoryCheckpoint(Checkpoint):
    """name -> tensor, and the JSON documents that a program would save beside them. Raises BadCheckpoint for no
    tensors.
    """

    no_files = _("a model in memory has no such file")

    def __init__(self, name: str, held: Mapping[str, HeldTensor], documents: Mapping[str, str] | None = None):
        super().__init__(Path(name))
        if not held:
            raise BadCheckpoint(_("{name}: holds no tensors; must hold one at least.", name=name))
        self._held = dict(held)
        self.json = {file: JsonFile(file, text.encode()) for file, text in (documents or {}).items()}
        shard, at = Shard(SHARD, 0), 0
        for tensor, (dtype, shape, _raw) in self._held.items():
            info = TensorInfo(tensor, DTYPES[dtype], tuple(shape), SHARD, at, at)
            at += DTYPES[dtype].nbytes(info.numel) or 0
            shard.tensors.append(info._replace(end=at))
        shard.size = at
        self.shards = {SHARD: shard}

    @property
    def name(self) -> str:
        return str(self.root)

    def open_file(self, shard: str) -> ShardFile:
        """The tensors as one run of bytes."""
        return _MemoryFile(self.shards[shard], self._held)


class _MemoryFile(ShardFile):
    """Reads bytes of tensors by their place in the shard. One tensor's bytes are kept at a time."""

    def __init__(self, shard: Shard, held: Mapping[str, HeldTensor]):
        self.name = self.path = shard.name
        self._fd = -1  # there is nothing to close
        self._size = shard.size
        self._tensors = [info for info in shard.tensors if info.nbytes]
        self._ends = [info.end for info in self._tensors]
        self._held = held
        self._open: tuple[str, np.ndarray] | None = None

    def size(self) -> int:
        return self._size

    def _bytes_of(self, name: str) -> np.ndarray:
        if self._open is None or self._open[0] != name:
            self._open = (name, self._held[name].raw())
        return self._open[1]

    def read(self, offset: int, n: int) -> bytes:
        buffer = bytearray(max(0, min(n, self._size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from offset. Raises BadCheckpoint where the tensors end before that."""
        out, done = np.frombuffer(buffer, np.uint8), 0
        while done < len(out):
            at = bisect.bisect_right(self._ends, offset + done)
            if at == len(self._tensors):
                raise self.ended(offset + done, len(out) - done)
            info = self._tensors[at]
            first = offset + done - info.begin
            n = min(len(out) - done, info.nbytes - first)
            out[done : done + n] = self._bytes_of(info.name)[first : first + n]
            done += n
