"""Other checkpoints that edits read from, opened once while they stay the same, and found by the `root` of the edit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo, new_digest

_DONATED: dict[str, Checkpoint] = {}


def open_donor(root: str) -> Checkpoint:
    """The checkpoint of an edit's `root`: a directory, or what `donate` registered under that name."""
    return _DONATED[root] if root in _DONATED else _open(os.path.abspath(root), _state(root))


@contextmanager
def donate(root: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Within it, `open_donor(root)` returns this checkpoint, which need not be a directory of this machine."""
    _DONATED[root] = checkpoint
    try:
        yield
    finally:
        del _DONATED[root]


def _state(root: str) -> tuple:
    """What tells a directory, or a file, from what lay there before; () for what cannot be listed."""
    try:
        listed = sorted(os.scandir(root), key=lambda entry: entry.name) if os.path.isdir(root) else [Path(root)]
        return tuple((e.name, (s := e.stat()).st_size, s.st_mtime_ns, s.st_ino) for e in listed)
    except OSError:
        return ()


@lru_cache(8)
def _open(root: str, _state: tuple) -> Checkpoint:
    return Checkpoint.open(root)


def tensor_digest(checkpoint: Checkpoint, info: TensorInfo) -> str:
    """blake2b (16 bytes, hexadecimal) of the tensor's bytes."""
    result = new_digest()
    with checkpoint.open_file(info.shard) as file:
        for part in checkpoint.chunks(file, info, 1 << 20):
            result.update(part)
    return result.hexdigest()
