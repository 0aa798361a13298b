"""Reads a file that may be anything: only a regular one, and only so much of it."""

import os
import stat
from pathlib import Path

from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.messages import _

_QUIET = _("Run the command again when nothing writes to the checkpoint.")


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of a listed file, for reading. What has become a pipe or a device since neither blocks nor is read.
    Raises OSError, and BadCheckpoint for what is no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadCheckpoint(_("{file}: is no regular file any more.", file=os.path.basename(path)), _QUIET)
    return fd


def require_same_link(path: Path, target: str | None) -> Path:
    """The path of a listed file that was a link to `target`, None for no link. Raises BadCheckpoint where it has become
    a link since, or one to another file.
    """
    if (os.path.realpath(path) if path.is_symlink() else None) != target:
        raise BadCheckpoint(_("{file}: became a link to another file while it was read.", file=path.name), _QUIET)
    return path


def read_regular(path: Path, limit: int) -> bytes:
    """Bytes of a regular file of at most `limit` bytes. A pipe never blocks, and of a device nothing is read. Raises
    OSError, and DoctorError for what is no regular file or longer.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DoctorError(_("{path}: not a regular file.", path=path), _("Give a regular file."))
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DoctorError(
            _("{path}: over {limit:,} bytes; at most that many are read.", path=path, limit=limit),
            _("Give another file."),
        )
    return data
