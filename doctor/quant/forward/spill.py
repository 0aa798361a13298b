"""What a run with little memory keeps on disk: hidden states of all rows, and what halted passes hold.

Files without a name in the staging folder: they end with the process, whatever ends it. They are written and read by
calls and not mapped, so that a full disk is an error that says so and not a signal, and so that the system may forget
what lies there.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

import torch

from doctor.core.errors import MachineError

_AT_ONCE = 1 << 30  # bytes of one call; the system takes 2 GiB at most


class Shelf:
    """One such file. Places are reserved one behind the other, written and read, and given back from the end."""

    def __init__(self, folder: Path):
        self._folder, self._end = folder, 0
        self.written = 0  # bytes so far
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._no_room(0, error) from None

    def reserve(self, size: int) -> int:
        """The place of `size` bytes. Raises MachineError where the disk has no room for them."""
        place, self._end = self._end, self._end + size
        try:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._file.fileno(), place, size)
        except OSError as error:
            raise self._no_room(size, error) from None
        return place

    @property
    def end(self) -> int:
        """Where the next place begins."""
        return self._end

    def give_back(self, end: int) -> None:
        """Every place from `end` on: what lies there is forgotten, on the disk too."""
        self._end = end
        os.ftruncate(self._file.fileno(), end)

    def write(self, place: int, storage: torch.UntypedStorage) -> None:
        """All bytes of a storage to a place. Raises MachineError where that fails."""
        try:
            for at, part in _parts(storage):
                done = 0
                while done < len(part):
                    done += os.pwrite(self._file.fileno(), part[done:], place + at + done)
            self.written += storage.nbytes()
        except OSError as error:
            raise self._no_room(storage.nbytes(), error) from None

    def read(self, place: int, storage: torch.UntypedStorage) -> None:
        """The storage's bytes from a place. Raises MachineError where that fails."""
        try:
            for at, part in _parts(storage):
                done = 0
                while done < len(part):
                    got = os.preadv(self._file.fileno(), [part[done:]], place + at + done)
                    if not got:
                        raise OSError("the file ends before them")
                    done += got
        except OSError as error:
            raise MachineError(
                f"{self._folder}: {storage.nbytes():,} bytes that were put there cannot be read: {error.strerror or error}.",
                "See what the system's log says of that disk; `--resume` goes on from the last finished block.",
            ) from None

    def _no_room(self, size: int, error: OSError) -> MachineError:
        return MachineError(
            f"{self._folder}: no room for {size:,} bytes that memory has none for: {error.strerror or error}.",
            "Free space there, or raise --memory; `--resume` goes on from the last finished block.",
        )


def _parts(storage: torch.UntypedStorage):
    """(offset, bytes) of a storage on the CPU, a GiB at a time, without a copy."""
    # Not through numpy(): a storage whose memory NumPy has seen can never be emptied again.
    whole = (
        memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
        if storage.nbytes()
        else b""
    )
    for at in range(0, len(whole), _AT_ONCE):
        yield at, whole[at : at + _AT_ONCE]
