"""Spill file for hidden states and suspended activations.

A file without a name in the staging directory: it ends with the process, whatever ends it. It is written and read by
calls and not mapped, so that a full disk is an error with a message and not a signal, and so that the system may drop
its pages from memory.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from doctor.core.errors import MachineError
from doctor.core.messages import _

_AT_ONCE = 1 << 30  # bytes of one call; the system takes 2 GiB at most


class SpillFile:
    """One spill file. Extents are reserved one behind the other, spilled and restored, and released from the end."""

    def __init__(self, folder: Path):
        self._folder, self._end = folder, 0
        self.written = 0  # bytes so far
        try:
            # it lives as long as the run, so no context manager closes it
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._disk_full(0, error) from None

    def reserve(self, size: int) -> int:
        """The offset of `size` new bytes. Raises MachineError where the disk is full."""
        offset, self._end = self._end, self._end + size
        try:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._file.fileno(), offset, size)
        except OSError as error:
            raise self._disk_full(size, error) from None
        return offset

    @property
    def end(self) -> int:
        """The offset of the next extent."""
        return self._end

    def release(self, end: int) -> None:
        """Forget everything from offset `end` on, on the disk too."""
        self._end = end
        os.ftruncate(self._file.fileno(), end)

    def spill(self, offset: int, storage: torch.UntypedStorage) -> None:
        """Write all bytes of a storage at an offset. Raises MachineError where that fails."""
        try:
            for at, part in _parts(storage):
                done = 0
                while done < len(part):
                    done += os.pwrite(self._file.fileno(), part[done:], offset + at + done)
            self.written += storage.nbytes()
        except OSError as error:
            raise self._disk_full(storage.nbytes(), error) from None

    def restore(self, offset: int, storage: torch.UntypedStorage) -> None:
        """Read the storage's bytes back from an offset. Raises MachineError where that fails."""
        try:
            for at, part in _parts(storage):
                done = 0
                while done < len(part):
                    got = os.preadv(self._file.fileno(), [part[done:]], offset + at + done)
                    if not got:
                        raise OSError("the file ends before them")
                    done += got
        except OSError as error:
            raise MachineError(
                _(
                    "{folder}: {size:,} spilled bytes cannot be read back: {why}.",
                    folder=self._folder,
                    size=storage.nbytes(),
                    why=error.strerror or error,
                ),
                _("See what the system's log says of that disk; `--resume` continues after the last finished layer."),
            ) from None

    def _disk_full(self, size: int, error: OSError) -> MachineError:
        return MachineError(
            _(
                "{folder}: cannot spill {size:,} bytes (memory limit reached): {why}.",
                folder=self._folder,
                size=size,
                why=error.strerror or error,
            ),
            _("Free space there, or raise --memory; `--resume` continues after the last finished layer."),
        )


def _parts(storage: torch.UntypedStorage) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a storage on the CPU, a GiB at a time, without a copy."""
    if not storage.nbytes():
        return
    # Not through numpy(): a storage whose memory NumPy has seen can never be emptied again.
    whole = memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
    for at in range(0, len(whole), _AT_ONCE):
        yield at, whole[at : at + _AT_ONCE]
