"""What the kernel and the file system can do: exchange names, share blocks, copy inside the kernel, lock, sync."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from enum import Enum
from functools import cache
from pathlib import Path

from doctor.core.errors import MachineError
from doctor.core.messages import _

# What a file system returns for an operation that it does not support; then the plainer way is taken.
CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK)
READ_BYTES = 1 << 20  # of a copy through memory, a call
COPIED_BELOW = 64 << 20  # bytes: a smaller file is always a copy of its own, since people edit such files
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_FICLONE = 0x40049409


class Carry(Enum):
    """How unchanged files get into an output. AUTO: blocks shared where the file system can, else copies of small files
    and hard links to large ones. COPY: copies. LINK: hard links.
    """

    AUTO = "auto"
    COPY = "copy"
    LINK = "link"

    def links(self, size: int, in_place: bool) -> bool:
        """Whether a file of `size` bytes may be a hard link. Never in place, where both are the user's: the kept
        checkpoint must not change with the fixed one.
        """
        return not in_place and (self is Carry.LINK or (self is Carry.AUTO and size >= COPIED_BELOW))


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories' names in one step (renameat2); False where the kernel or the file system cannot."""
    libc = _libc()
    if not hasattr(libc, "renameat2"):
        return False
    here = -100  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_folder(path: str | os.PathLike) -> None:
    """Sync a directory, so that its names survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_back(fd: int, offset: int, count: int) -> None:
    """Start writing these bytes to the disk, without waiting (sync_file_range). Only fsync guarantees that they
    arrive.
    """
    call = getattr(_libc(), "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def create_file(path: Path) -> Iterator[int]:
    """A new file of mode 0644 less the umask, open for writing (safetensors' own writer leaves 0600, unreadable for
    others).
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte, in as many calls as it takes."""
    while len(data):
        data = data[os.write(fd, data) :]


def read_write(source_fd: int, fd: int, count: int, offset: int) -> int:
    """Copy up to READ_BYTES from `offset` of one file to the end of another, through memory; returns the bytes
    copied.
    """
    part = os.pread(source_fd, min(count, READ_BYTES), offset)
    write_all(fd, memoryview(part))
    return len(part)


def reflink(source: str, target: Path) -> bool:
    """Share the source's blocks with a new file; False where the file system cannot."""
    done = False
    with open(source, "rb", buffering=0) as file, create_file(target) as fd:
        try:
            fcntl.ioctl(fd, _FICLONE, file.fileno())
            done = True
        except OSError as error:
            if error.errno not in CANNOT:
                raise
    if not done:
        os.unlink(target)
    return done


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def machine_errors(where: Path, advice: str = "") -> Iterator[None]:
    """Turn errors of the operating system into MachineError with the path and what to do."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if not advice:
            advice = _("The source is untouched and no output was written.")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = _("Free some space there and run the command again. {untouched}", untouched=advice)
        raise MachineError(_("{path}: {error}.", path=place, error=error.strerror or error), advice) from error
