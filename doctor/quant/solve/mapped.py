"""Squares of [k, k] in files without names, mapped into memory: for linears whose square is past the memory limit.

A file is allocated before it is mapped, so that a full disk is an error with a message and not a signal. Whoever works
on a square goes through it in rows and lets go of them: what was changed stays in the system's cache as long as there
is memory, and on disk after that, but no longer in the memory of this process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch

from doctor.core.errors import MachineError
from doctor.core.messages import _


class Mapped:
    """Zeros f32[k, k] in a file in `folder`, which ends with this object or with the process. Raises MachineError where
    the disk is full.
    """

    def __init__(self, folder: Path, k: int):
        self.folder, self._row = folder, 4 * k
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, self._row * k)
                self._pages = mmap.mmap(file.fileno(), self._row * k)
        except OSError as error:
            raise MachineError(
                _(
                    "{folder}: no file of {size:,} bytes for a Hessian of {k:,} columns (memory limit reached): {why}.",
                    folder=str(folder),
                    size=self._row * k,
                    k=k,
                    why=error.strerror or str(error),
                ),
                _("Free space there, or raise --memory; `--resume` continues after the last finished layer."),
            ) from None
        self.values = torch.frombuffer(self._pages, dtype=torch.float32).view(k, k)

    def forget(self) -> None:
        """Let go of all rows: they are read again when they are needed."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def will_need(self, rows: slice) -> None:
        """Start reading rows [start, stop)."""
        begin = rows.start * self._row // mmap.PAGESIZE * mmap.PAGESIZE
        self._pages.madvise(mmap.MADV_WILLNEED, begin, rows.stop * self._row - begin)
