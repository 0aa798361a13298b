"""Writes an overlay into a staging directory: unchanged files are linked, edited shards are streamed.

Files that no edit changes share blocks with the source where the file system can (reflink); else small ones are copied
and large ones are hard links, which is said. Of an edited shard, ranges that no edit touches are copied inside the
kernel. Every written file is synced, while the next one is written.
"""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from doctor.checkpoint.safetensors import ShardFile
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.edits.overlay import EditedCheckpoint
from doctor.edits.shard_layout import Piece
from doctor.fixing.filesystem import (
    CANNOT,
    Carry,
    create_file,
    machine_errors,
    read_write,
    reflink,
    write_all,
    write_back,
)
from doctor.fixing.in_place import and_more
from doctor.fixing.receipt import RECEIPT, WrittenFile, is_ours
from doctor.fixing.staging import StagingDir, is_fetched

COPY_STEP = 64 << 20  # bytes a call: larger steps were no faster, and Ctrl-C is handled between them
SLAB_BYTES = 1 << 20  # of an edited tensor at once: larger slabs leave the cache and took twice the system time
WRITE_BACK_STEP = 16 << 20  # the disk starts writing every so many bytes, so that the final sync has little left to do


def write_overlay(overlay: EditedCheckpoint, staging: StagingDir, *, carry: Carry = Carry.AUTO) -> None:
    """Write every file of the overlay; carry: how those that no edit changes get there.

    Raises MachineError (disk, permissions) or BadCheckpoint (the source changed meanwhile).
    """
    # Shards are synced while the next one is written; leaving the block waits for all of them, whatever happened.
    with machine_errors(staging.path), ThreadPoolExecutor(1) as pool:
        writer = _Writer(overlay, staging, carry, pool)
        before = writer.source_state()
        writer.write()
    for folder, names in writer.linked.items():
        staging.notes.append(
            _(
                "{files}: linked: the same file as in {source}, so a change of one changes both; --copy writes "
                "files of its own",
                files=and_more(names),
                source=folder,
            )
        )
    if writer.private:
        staging.notes.append(
            _(
                "{files}: linked, so still readable by the owner alone, as in the source; --copy gives mode 0644",
                files=and_more(writer.private),
            )
        )
    for problem in overlay.problems:
        staging.not_carried[problem.tensor or "?"] = problem.detail
    if writer.source_state() != before:
        raise BadCheckpoint(
            _("{path}: the files changed while they were read.", path=overlay.source.root),
            _("Run the command again when no other program writes there."),
        )


class _Writer:
    def __init__(self, overlay: EditedCheckpoint, staging: StagingDir, carry: Carry, pool: ThreadPoolExecutor):
        self.overlay, self.staging, self.carry, self.pool = overlay, staging, carry, pool
        self.shares, self.can_link = carry is Carry.AUTO, True  # until the file system refuses
        self.linked: dict[str, list[str]] = {}  # folder -> files that are hard links to its own
        self.private: list[str] = []  # linked files that only their owner may read
        self.syncing: list[Future[None]] = []

    def write(self) -> None:
        overlay = self.overlay
        for name in sorted(overlay.entries, key=lambda n: (not n.endswith(".safetensors"), n)):
            if name == RECEIPT and not overlay.only:
                self._leave_receipt()
            elif name in overlay.pieces:
                self._write_shard(name)
            elif name in overlay.changed - overlay.substituted:
                self.staging.add(name, overlay.read_file(name))
            else:
                self._carry(name, os.path.realpath(overlay.source.path(name)))
        if overlay.carries_folders and not overlay.only:
            self._carry_folders()
        for job in self.syncing:
            job.result()

    def _leave_receipt(self) -> None:
        """Leave out the receipt of an earlier run, which the new one quotes, and report any other file of its name."""
        found = self.overlay.source.value(RECEIPT)
        if not is_ours(found):
            self.staging.not_carried[RECEIPT] = _("not a receipt of doctor, whose receipt takes this name")
            self.staging.notes.append(
                _("{file}: the source's file of this name is not a receipt and is not in the output", file=RECEIPT)
            )

    def _write_shard(self, name: str) -> None:
        with create_file(self.staging.path / name) as fd, self.overlay.open_file(name) as file:
            at = started = 0
            for piece in self.overlay.pieces[name]:
                if piece.source is not None:
                    self._copy_range(file, piece.source, fd, piece.end - piece.begin, piece.begin)
                    at = started = piece.end
                    continue
                for part in _parts(file, piece):
                    write_all(fd, part)
                    self.staging.progress(len(part))
                    at += len(part)
                    if at - started >= WRITE_BACK_STEP:
                        write_back(fd, started, at - started)
                        started = at
            self._sync_behind(fd)
        self.staging.files.append(WrittenFile(name, "written", self.overlay.entries[name].size))

    def _carry(self, name: str, source: str) -> None:
        """Carry over a file that no edit changes. `source` has its symbolic links resolved."""
        target = self.staging.path / name
        info = os.stat(source)
        size = info.st_size
        if self.shares:
            if reflink(source, target):
                self.staging.files.append(WrittenFile(name, "reflinked", size))
                return
            self.shares = False
        if self.can_link and self.carry.links(size, self.staging.in_place):
            try:
                os.link(source, target)
                self.staging.files.append(WrittenFile(name, "linked", size))
                if not is_fetched(source):
                    self.linked.setdefault(os.path.dirname(source), []).append(name)
                if not info.st_mode & 0o044:
                    self.private.append(name)
                return
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                self.can_link = False
                self.staging.notes.append(
                    _(
                        "unchanged files are copied: {file} cannot be linked ({error})",
                        file=os.path.basename(source),
                        error=os.strerror(error.errno),
                    )
                )
        with create_file(target) as fd, open(source, "rb", buffering=0) as file:
            self._copy_range(file, 0, fd, size)
            self._sync_behind(fd)
        self.staging.files.append(WrittenFile(name, "copied", size))

    def _carry_folders(self) -> None:
        root = os.path.realpath(self.overlay.source.root)
        for folder, folders, names in os.walk(root):
            hidden = [f for f in folders if f.startswith(".")]
            for name in hidden:
                self.staging.not_carried[os.path.relpath(os.path.join(folder, name), root) + "/"] = _(
                    "a hidden directory"
                )
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in [f for f in folders if os.path.islink(os.path.join(folder, f))]:
                self.staging.not_carried[os.path.relpath(os.path.join(folder, name), root)] = _(
                    "a symbolic link to a directory"
                )
            if folder == root:
                continue
            os.makedirs(self.staging.path / os.path.relpath(folder, root), exist_ok=True)
            for name in sorted(names):
                path = os.path.join(folder, name)
                real, relative = os.path.realpath(path), os.path.relpath(path, root)
                if (os.path.islink(path) and not self.overlay.source.may_follow(real)) or not os.path.isfile(real):
                    self.staging.not_carried[relative] = _(
                        "a link that leads out of the directory, or not a regular file"
                    )
                else:
                    self._carry(relative, real)

    def _sync_behind(self, fd: int) -> None:
        """Sync a finished file in the background; `write` waits for it and raises what it raised."""
        own = os.dup(fd)

        def sync() -> None:
            try:
                os.fsync(own)
            finally:
                os.close(own)

        self.syncing.append(self.pool.submit(sync))

    def _copy_range(self, source: BinaryIO | ShardFile, offset: int, fd: int, count: int, at: int = 0) -> None:
        """Copy `count` bytes of an open file from `offset` to the end of `fd`, at byte `at`, inside the kernel if
        possible.
        """
        source_fd = source.fileno()
        in_kernel = hasattr(os, "copy_file_range")
        while count:
            step = min(count, COPY_STEP)
            try:
                done = (
                    os.copy_file_range(source_fd, fd, step, offset)
                    if in_kernel
                    else read_write(source_fd, fd, step, offset)
                )
            except OSError as error:
                if not in_kernel or error.errno not in CANNOT:
                    raise
                in_kernel = False
                continue
            if done == 0:
                raise BadCheckpoint(
                    _(
                        "{file}: ends at byte {offset:,}, {count:,} bytes early; it was truncated while being read.",
                        file=source.name,
                        offset=offset,
                        count=count,
                    )
                )
            write_back(fd, at, done)
            offset += done
            at += done
            count -= done
            self.staging.progress(done)

    def source_state(self) -> dict[str, tuple[int, int, int]]:
        """Inode, size and mtime of each file: they change when a program writes to the source, not by hard links."""
        state = {}
        for name in self.overlay.source.entries:
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(self.overlay.source.path(name))
                state[name] = (info.st_ino, info.st_size, info.st_mtime_ns)
        return state


def _parts(file: ShardFile, piece: Piece) -> Iterator[memoryview]:
    """The bytes of a piece that is not a range of the source: literal, or whole rows of an edited tensor."""
    if piece.tensor is None:
        yield memoryview(piece.data or b"")
        return
    step, rows = max(SLAB_BYTES // piece.tensor.row_bytes, 1), piece.tensor.shape[0]
    for row in range(0, rows, step):
        yield np.ascontiguousarray(piece.tensor.rows(file, row, min(row + step, rows))).reshape(-1).view(np.uint8).data
