"""One writer an output: a lock file beside it, with the host, the process and when that process started.

The kernel's lock on the file (flock) ends with its process, however that ends, and holds between containers of one
machine. The record in the file is for what the kernel's lock does not reach: another machine on a shared file system,
and file systems without locks. There a process number alone says nothing, since numbers are used again, so the start
time and the boot are compared too.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doctor.checkpoint.regular import read_regular
from doctor.core.errors import DoctorError, PlanRefused
from doctor.core.messages import _
from doctor.fixing.filesystem import machine_errors

MAX_RECORD_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, int] = {}  # lock file -> the thread of this process that holds it


def lock_name(output: Path) -> Path:
    """The lock file of an output directory."""
    return output.parent / f".{output.name}.doctor-lock"


@contextlib.contextmanager
def hold(output: Path) -> Iterator[bool]:
    """Keep every other run away from `output` until the block ends. Within the block the same thread may hold it again;
    the value is False then. Raises PlanRefused while another run holds it, MachineError where no file can be made.
    """
    path = lock_name(output)
    if _held.get(str(path)) == threading.get_ident():
        yield False
        return
    with machine_errors(path):
        made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
        os.makedirs(path.parent, exist_ok=True)
        fd = _acquire(path, output)
    _held[str(path)] = threading.get_ident()
    try:
        yield True
    finally:
        del _held[str(path)]
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)
        with contextlib.suppress(OSError):  # those that hold something stay
            for folder in made:
                os.rmdir(folder)


def _acquire(path: Path, output: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            locked = _flock(fd)
            if locked is False or _is_alive(_read(path), by_record=locked is None):
                raise _refusal(path, output)
            if _is_same(fd, path):  # else its holder removed it in between
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(_me()).encode(), 0)
                os.fsync(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _flock(fd: int) -> bool | None:
    """Whether the kernel's lock was taken; None where the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _refusal(path: Path, output: Path) -> PlanRefused:
    holder = _read(path)
    return PlanRefused(
        _(
            "{path}: process {pid} on {host} is writing it.",
            path=output,
            pid=holder.get("pid", "?"),
            host=holder.get("host", "?"),
        ),
        _("Wait for it to end or choose another output. If that machine was switched off, delete {lock}.", lock=path),
    )


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "start": started(os.getpid())}


def _read(path: Path) -> dict[str, Any]:
    """The record of a lock file, {} where it holds none: its writer was killed before it wrote."""
    try:
        found = json.loads(read_regular(path, MAX_RECORD_BYTES))
    except (OSError, ValueError, RecursionError, DoctorError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, Any], by_record: bool) -> bool:
    """Whether a record names a process that may still run, once this process has the kernel's lock (by_record: there is
    none).
    """
    if not isinstance(holder.get("pid"), int) or not isinstance(holder.get("host"), str):
        return False
    me = _me()
    if holder["host"] != me["host"] and holder.get("boot") != me["boot"]:
        return True  # another machine: nothing here can tell
    if not by_record or holder.get("boot") != me["boot"]:
        return False
    return started(holder["pid"]) is not None and started(holder["pid"]) == holder.get("start")


def started(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None where none has this number. Where there is no /proc, only
    whether it runs.
    """
    try:
        # The name may hold blanks and brackets; the start is the 20th field after it (proc_pid_stat(5)).
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
