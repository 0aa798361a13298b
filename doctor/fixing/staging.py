"""Puts a view on disk so that the output is whole or absent, and the source is never written to.

Everything goes into a stage directory beside the output, on the same file system: files no edit changes become reflinks
or hard links, edited shards are streamed (untouched ranges copied inside the kernel), every written file is synced. The
caller then opens the stage, scans it and calls `commit`: one rename. An error, Ctrl-C or a kill before that leaves no
output; what a killed run left behind is removed by the next one, which says so.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, MachineError, PlanRefused
from doctor.edits.overlay import EditedCheckpoint
from doctor.edits.shard_layout import Piece
from doctor.fixing.in_place import CANNOT, exchange, kept_name, swap, sync_folder, write_back

COPY_STEP = 64 << 20  # bytes a call: larger steps were no faster, and Ctrl-C is heard between them
SLAB_BYTES = (
    1 << 20
)  # of an edited tensor worked out at once: larger slabs leave the cache and took twice the system time
WRITE_BACK_STEP = (
    16 << 20
)  # the disk is set to work every so many bytes, so that little is left for the sync at the end
SPARE_BYTES = 1 << 20  # left free for directory entries and the receipt
RECEIPT = "doctor.json"
_FICLONE = 0x40049409


@dataclass(frozen=True)
class Written:
    """One file of the output. how: "written" (edited), "reflinked", "linked" or "copied" (content as in the source)."""

    name: str
    how: str
    size: int


@dataclass
class Stage:
    """A stage directory under construction. Use `with open_stage(view, output) as stage`."""

    view: EditedCheckpoint
    output: Path
    path: Path
    copy: bool = False
    overwrite: bool = False
    in_place: bool = False
    progress: Callable[[int], None] = lambda n: None
    files: list[Written] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what happened that a user must be told
    not_carried: dict[str, str] = field(default_factory=dict)  # file of the source -> why it is not in the output
    committed: bool = False
    _way: str = "reflink"  # the cheapest way that has not been refused yet
    _private: list[str] = field(default_factory=list)  # linked files that only their owner may read
    _pool: ThreadPoolExecutor | None = None
    _syncing: list[Future] = field(default_factory=list)

    def write(self) -> None:
        """Every file of the view. Raises MachineError (disk, permissions) or BadCheckpoint (the source changed
        meanwhile).
        """
        before = self._source_state()
        # Shards are synced while the next one is written; leaving the block waits for all of them, whatever happened.
        with _machine(self.path), ThreadPoolExecutor(1) as pool:
            self._pool = pool
            for name in sorted(self.view.entries, key=lambda n: (not n.endswith(".safetensors"), n)):
                if name == RECEIPT and not self.view.only:
                    self._leave_receipt()
                    continue
                if name in self.view.pieces:
                    self._write_shard(name)
                elif name in self.view.changed - self.view.substituted:
                    self.add(name, self.view.read_file(name))
                else:
                    self._carry(name, os.path.realpath(self.view.source.path(name)))
            if not self.view.only:
                self._carry_folders()
            for job in self._syncing:
                job.result()
        if self._private:
            more = f" and {len(self._private) - 1} more" if len(self._private) > 1 else ""
            self.notes.append(
                f"{self._private[0]}{more}: linked, so still readable by the owner alone, as in the source; --copy gives mode 0644"
            )
        for problem in self.view.problems:
            self.not_carried[problem.tensor or "?"] = problem.detail
        if self._source_state() != before:
            raise BadCheckpoint(
                f"{self.view.source.root}: the files changed while they were read.",
                "Run the command again when nothing writes there.",
            )

    def _leave_receipt(self) -> None:
        """The receipt of an earlier run, which the new one quotes; a file of another kind is said to be missing."""
        found = self.view.source.value(RECEIPT)
        if found is None or not str(found.get("schema", "")).startswith("doctor.receipt"):
            self.not_carried[RECEIPT] = "no receipt of doctor, whose receipt stands under this name now"
            self.notes.append(f"{RECEIPT}: the source's own file of this name is no receipt and is not in the output")

    def add(self, name: str, data: bytes) -> None:
        """One small file, synced."""
        with _machine(self.path), _create(self.path / name) as fd:
            _write_all(fd, memoryview(data))
            os.fsync(fd)
        self.files.append(Written(name, "written", len(data)))
        self.progress(len(data))

    def commit(self) -> None:
        """Sync the stage and rename it to the output: from here on the output is there, whole."""
        with _machine(self.output):
            for folder, _, _ in os.walk(self.path):
                sync_folder(folder)
            if self.in_place:
                swap(self.path, self.output)
            elif os.path.lexists(self.output):
                self._replace()
            else:
                os.rename(self.path, self.output)
            self.committed = True
        try:
            sync_folder(self.output.parent)
        except OSError as error:
            self.notes.append(
                f"{self.output.parent}: {error.strerror}; the output is whole, but a power cut now could still lose it"
            )

    def _replace(self) -> None:
        if not os.listdir(self.output):
            os.rename(self.path, self.output)  # rename(2) takes an empty directory's place
        elif not self.overwrite:
            raise MachineError(f"{self.output}: appeared while the stage was written.", "Choose another output.")
        elif exchange(self.path, self.output):
            self.committed = True
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            aside = _aside(self.output)
            os.rename(self.output, aside)
            try:
                os.rename(self.path, self.output)
            except BaseException:
                os.rename(aside, self.output)
                raise
            self.committed = True
            shutil.rmtree(aside, ignore_errors=True)

    # files

    def _write_shard(self, name: str) -> None:
        with _create(self.path / name) as fd, self.view.open_file(name) as file:
            at = started = 0
            for piece in self.view.pieces[name]:
                if piece.source is not None:
                    self._copy_range(file, piece.source, fd, piece.end - piece.begin, piece.begin)
                    at = started = piece.end
                    continue
                for part in _parts(file, piece):
                    _write_all(fd, part)
                    self.progress(len(part))
                    at += len(part)
                    if at - started >= WRITE_BACK_STEP:
                        write_back(fd, started, at - started)
                        started = at
            self._sync_behind(fd)
        self.files.append(Written(name, "written", self.view.entries[name].size))

    def _carry(self, name: str, source: str) -> None:
        """A file that no edit changes. `source` has its symbolic links resolved."""
        target = self.path / name
        info = os.stat(source)
        size = info.st_size
        if not self.copy and self._way == "reflink":
            if _reflink(source, target):
                self.files.append(Written(name, "reflinked", size))
                return
            self._way = "link"
        if not self.copy and self._way == "link":
            try:
                os.link(source, target)
                self.files.append(Written(name, "linked", size))
                if not info.st_mode & 0o044:
                    self._private.append(name)
                return
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                self._way = "copy"
                self.notes.append(
                    f"unchanged files are copied: {os.path.basename(source)} cannot be linked ({os.strerror(error.errno)})"
                )
        with _create(target) as fd, open(source, "rb", buffering=0) as file:
            self._copy_range(file, 0, fd, size)
            self._sync_behind(fd)
        self.files.append(Written(name, "copied", size))

    def _carry_folders(self) -> None:
        root = os.path.realpath(self.view.source.root)
        for folder, folders, names in os.walk(root):
            hidden = [f for f in folders if f.startswith(".")]
            for name in hidden:
                self.not_carried[os.path.relpath(os.path.join(folder, name), root) + "/"] = "a hidden directory"
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in [f for f in folders if os.path.islink(os.path.join(folder, f))]:
                self.not_carried[os.path.relpath(os.path.join(folder, name), root)] = "a symbolic link to a directory"
            if folder == root:
                continue
            os.makedirs(self.path / os.path.relpath(folder, root), exist_ok=True)
            for name in sorted(names):
                path = os.path.join(folder, name)
                real, relative = os.path.realpath(path), os.path.relpath(path, root)
                if (os.path.islink(path) and not self.view.source.may_follow(real)) or not os.path.isfile(real):
                    self.not_carried[relative] = "a link that leads out of the directory, or no regular file"
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

        self._syncing.append(self._pool.submit(sync))

    def _copy_range(self, source, offset: int, fd: int, count: int, at: int = 0) -> None:
        """`count` bytes of an open file from `offset` to the end of `fd`, which is at byte `at`, inside the kernel
        where it can.
        """
        source_fd = source.fileno()
        in_kernel = hasattr(os, "copy_file_range")
        while count:
            step = min(count, COPY_STEP)
            try:
                done = (
                    os.copy_file_range(source_fd, fd, step, offset)
                    if in_kernel
                    else _read_write(source_fd, fd, step, offset)
                )
            except OSError as error:
                if not in_kernel or error.errno not in CANNOT:
                    raise
                in_kernel = False
                continue
            if done == 0:
                raise BadCheckpoint(
                    f"{source.name}: ends at byte {offset:,} while {count:,} more were to come; it became shorter while it was read."
                )
            write_back(fd, at, done)
            offset += done
            at += done
            count -= done
            self.progress(done)

    def _source_state(self) -> dict:
        """What changes when somebody writes to the source; the hard links this run makes do not."""
        state = {}
        for name in self.view.source.entries:
            with contextlib.suppress(FileNotFoundError):
                info = os.stat(self.view.source.path(name))
                state[name] = (info.st_ino, info.st_size, info.st_mtime_ns)
        return state


@contextlib.contextmanager
def open_stage(
    view: EditedCheckpoint,
    output: str | os.PathLike,
    *,
    copy: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[Stage]:
    """A stage for `output`, removed again unless it was committed.

    progress gets the bytes of each step. Raises PlanRefused for an output that may not be written, MachineError for a
    disk that is too small or refuses.
    """
    output = Path(os.path.abspath(output))
    if in_place:
        check_in_place(view.source, output)
    else:
        check_output(view.source, output, overwrite)
    with _machine(output):
        os.makedirs(output.parent, exist_ok=True)
        notes = clean_stale(output)
        need = bytes_needed(view, output.parent, copy)
        disk = os.statvfs(output.parent)
        free = disk.f_bavail * disk.f_frsize
        if need + SPARE_BYTES > free:
            raise MachineError(
                f"{output.parent}: {free:,} bytes are free; {need + SPARE_BYTES:,} will be written.",
                "Free some space, or choose an output on the source's own file system, where unchanged files are only linked.",
            )
        path = _stage_path(output, os.getpid())
        os.mkdir(path)
    stage = Stage(view, output, path, copy, overwrite, in_place, progress, notes=notes)
    lock = None
    try:
        with _machine(output):
            lock = _lock(path)
        yield stage
    finally:
        if lock is not None:
            os.close(lock)
        if not stage.committed:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def open_fetch(output: Path) -> Iterator[Path]:
    """A directory beside `output` for what is fetched from elsewhere, so that a file of it is linked into the stage and
    not copied.
    """
    parent = next(p for p in output.parents if p.is_dir())
    with _machine(parent):
        if parent == output.parent:
            clean_stale(output)
        path = parent / f".{output.name}.doctor-fetch-{os.getpid()}"
        os.mkdir(path)
        lock = _lock(path)
    try:
        yield path
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def check_output(source: Checkpoint, output: Path, overwrite: bool) -> None:
    """Raises PlanRefused where writing `output` could harm something that is there."""
    root, real = os.path.realpath(source.root), os.path.realpath(output)
    if real == root or real.startswith(root + os.sep) or root.startswith(real + os.sep):
        raise PlanRefused(
            f"{output}: lies in the source, or the source in it; the source is never written to.",
            "Choose another output.",
        )
    if not os.path.lexists(output):
        return
    if os.path.islink(output) or not os.path.isdir(output):
        raise PlanRefused(f"{output}: exists and is not a directory.", "Choose another output.")
    there = os.listdir(output)
    if there and not overwrite:
        raise PlanRefused(
            f"{output}: exists and holds {_files(there)}; an output must be new or empty.",
            "Choose another output, or `doctor fix --overwrite`.",
        )
    if there and not any(n in ("config.json", RECEIPT) or n.endswith(".safetensors") for n in there):
        raise PlanRefused(
            f"{output}: holds {_files(there)} and none of them is a checkpoint's; --overwrite replaces checkpoints only.",
            "Choose another output.",
        )


def _files(names: list[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names):,} files"


def check_in_place(source: Checkpoint, path: Path) -> None:
    """Raises PlanRefused where a checkpoint cannot change places with its fixed copy."""
    if source.only or os.path.realpath(source.root) != str(path):
        raise PlanRefused(
            f"{source.root}: no plain directory of its own name; only such a one is fixed in place.",
            "Write a copy with -o.",
        )
    if any(entry.target for entry in source.entries.values()) or path.parent.name == "snapshots":
        raise PlanRefused(
            f"{path}: its files are links, as in a Hub cache, which other programs count on.", "Write a copy with -o."
        )
    kept = kept_name(path)
    if os.path.lexists(kept):
        raise PlanRefused(
            f"{kept}: holds what an earlier fix in place replaced.",
            f"`doctor undo {path}` puts it back; delete it if it is not needed.",
        )


def bytes_needed(view: EditedCheckpoint, parent: Path, copy: bool) -> int:
    """Bytes of new disk space: the changed files, and the others where they cannot be linked."""
    need = sum(view.entries[n].size for n in view.changed if n in view.entries)
    device = os.stat(parent).st_dev
    for name, entry in view.entries.items():
        if name not in view.changed and (copy or os.stat(view.source.path(name)).st_dev != device):
            need += entry.size
    return need


def changed_since(folder: Path, receipt: dict) -> list[str]:
    """Files of an output that are not what its receipt says: other bytes in edited ones, other sizes, absent, or
    more.
    """
    written = {e["file"]: e for e in receipt["written"]}
    known = {**{e["file"]: e["bytes"] for e in receipt["unchanged"]}, **{n: e["bytes"] for n, e in written.items()}}
    found = {
        str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != RECEIPT
    }
    wrong = [
        n
        for n in sorted({*known, *found})
        if known.get(n) != found.get(n) and not (n in written and n not in found and not known[n])
    ]
    return wrong + [n for n, e in written.items() if n not in wrong and e["sha256_after"] != sha256(folder / n)]


def clean_stale(output: Path) -> list[str]:
    """Remove what killed runs left beside the output; put back an output that one had moved aside. Says what it did."""
    notes = []
    prefix = f".{output.name}.doctor-"
    for name in sorted(os.listdir(output.parent)):
        kind, _, pid = name.removeprefix(prefix).partition("-")
        path = output.parent / name
        if (
            not name.startswith(prefix)
            or kind not in ("stage", "old", "fetch")
            or not pid.isdigit()
            or not _is_dead(path, int(pid))
        ):
            continue
        if kind == "old" and not os.path.lexists(output):
            os.rename(path, output)
            notes.append(f"{output} was moved aside by a run that was killed (process {pid}); it is back")
        else:
            shutil.rmtree(path, ignore_errors=True)
            notes.append(f"removed {path.name}, left by a run that was killed (process {pid})")
    return notes


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stage_path(output: Path, pid: int) -> Path:
    return output.parent / f".{output.name}.doctor-stage-{pid}"


def _aside(output: Path) -> Path:
    return output.parent / f".{output.name}.doctor-old-{os.getpid()}"


def _lock(path: Path) -> int | None:
    """A lock on the stage that ends with this process; None where the file system has none."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def _is_dead(path: Path, pid: int) -> bool:
    """No such process here, and nobody elsewhere (a shared file system) holds the directory's lock."""
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    fd = _lock(path)
    if fd is None:
        return False
    os.close(fd)
    return True


@contextlib.contextmanager
def _machine(where: Path) -> Iterator[None]:
    """Errors of the operating system as MachineError."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        raise MachineError(
            f"{place}: {error.strerror or error}.", "The source is untouched and no output was made."
        ) from error


@contextlib.contextmanager
def _create(path: Path) -> Iterator[int]:
    """A new file of mode 0644 less the umask, open for writing (safetensors' own writer leaves 0600, which locks others
    out).
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]


def _read_write(source_fd: int, fd: int, count: int, offset: int) -> int:
    part = os.pread(source_fd, min(count, SLAB_BYTES), offset)
    _write_all(fd, memoryview(part))
    return len(part)


def _parts(file, piece: Piece) -> Iterator[memoryview]:
    """The bytes of a piece that is no range of the source: literal, or whole rows of an edited tensor."""
    if piece.tensor is None:
        yield memoryview(piece.data)
        return
    step, rows = max(SLAB_BYTES // piece.tensor.row_bytes, 1), piece.tensor.shape[0]
    for row in range(0, rows, step):
        yield np.ascontiguousarray(piece.tensor.rows(file, row, min(row + step, rows))).reshape(-1).view(np.uint8).data


def _reflink(source: str, target: Path) -> bool:
    """Share the source's blocks with a new file; False where the file system cannot."""
    done = False
    with open(source, "rb", buffering=0) as file, _create(target) as fd:
        try:
            fcntl.ioctl(fd, _FICLONE, file.fileno())
            done = True
        except OSError as error:
            if error.errno not in CANNOT:
                raise
    if not done:
        os.unlink(target)
    return done
