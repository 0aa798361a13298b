"""Reads a file that may be anything: only a regular one, and only so much of it."""

import os
import stat
from pathlib import Path

from doctor.core.errors import DoctorError
from doctor.core.messages import _


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
