"""A fix in place, and its undoing: two directories change names in one step, and nothing is ever written into either.

NAME becomes the fixed checkpoint and NAME.before-fix what it was. A journal beside them, synced before the first
rename, names both directories by inode, so that the next run knows from any state between which is which and finishes
or takes back:

    before the swap      NAME = old               the stage and the new NAME.before-fix go away
    after it             NAME = new               the journal goes away
    between two renames  NAME is absent           NAME.before-fix = old takes its name again

Where the kernel can exchange names (renameat2), the third state does not occur. An undo keeps the same journal (`undo`
in it), with the same states seen from the other side: old is what NAME.before-fix was, new the fixed copy, which passes
through NAME.after-fix.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
from functools import cache
from pathlib import Path

from doctor.core.errors import MachineError, PlanRefused

_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
# What a file system says that cannot do it: then the plainer way is taken.
CANNOT = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM, errno.EMLINK)


def kept_name(path: Path) -> Path:
    """Where the checkpoint that a fix in place replaces is kept."""
    return path.with_name(path.name + ".before-fix")


def after_name(path: Path) -> Path:
    """Where an undo keeps a fixed copy that was changed since."""
    return path.with_name(path.name + ".after-fix")


def swap(stage: Path, path: Path) -> None:
    """`stage` becomes `path`, and what `path` was is kept beside it. Raises OSError; then `path` is as it was, or
    `recover` makes it so.
    """
    kept, journal = kept_name(path), _journal(path)
    _write_journal(journal, {"pid": os.getpid(), "old": _inode(path), "new": _inode(stage)})
    os.rename(stage, kept)
    try:
        if not exchange(kept, path):
            os.rename(kept, stage)
            os.rename(path, kept)
            os.rename(stage, path)
    except BaseException:
        recover(path)
        raise
    sync_folder(path.parent)
    os.unlink(journal)


def recover(path: Path) -> list[str]:
    """Finish or take back a swap that a killed run left half done; says what it did. Does nothing where there is no
    journal.
    """
    journal, kept = _journal(path), kept_name(path)
    try:
        record = json.loads(journal.read_text(encoding="utf-8"))
        old, new = record["old"], record["new"]
    except FileNotFoundError:
        return []
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # cut short: it is synced before anything is renamed, so nothing was
        with contextlib.suppress(OSError):
            os.unlink(journal)
        return []
    if record.get("pid") != os.getpid() and _lives(record.get("pid")):
        raise PlanRefused(f"{path}: process {record['pid']} is changing it in place.", "Wait for it to end.")
    if "undo" in record:
        notes = _finish_undo(path, record)
    else:
        notes = _finish_swap(path, kept, old, new)
    sync_folder(path.parent)
    os.unlink(journal)
    return notes


def _finish_swap(path: Path, kept: Path, old: int, new: int) -> list[str]:
    notes = []
    if not os.path.lexists(path) and _inode(kept) == old:
        os.rename(kept, path)
        notes.append(f"{path}: a fix in place was killed; what was there is back")
    elif _inode(path) == old and _inode(kept) == new:
        shutil.rmtree(kept, ignore_errors=True)
        notes.append(f"{path}: a fix in place was killed before it took effect; what it had written is removed")
    return notes


def _finish_undo(path: Path, record: dict) -> list[str]:
    """From any state between: nothing was renamed and nothing happens, or the undo is carried to its end."""
    kept, after = kept_name(path), after_name(path)
    if _inode(path) == record["new"]:
        return []
    if not os.path.lexists(path) and _inode(kept) == record["old"]:
        os.rename(kept, path)
    if _inode(kept) == record["new"]:
        os.rename(kept, after)
    return [f"{path}: an undo was killed; it is finished. {_settle(path, after, record['undo'])}"]


def _settle(path: Path, after: Path, changed: list[str]) -> str:
    """What becomes of the fixed copy, once NAME is what it was."""
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{path} is what it was before the fix. The fixed copy was changed since ({changed[0]}{more}), so it is kept as {after}"
    shutil.rmtree(after, ignore_errors=True)
    return f"{path} is what it was before the fix. The fixed copy was as the receipt says and is removed"


def undo(path: Path, receipt: dict, changed: list[str]) -> str:
    """Give `path` back what a fix in place replaced, by the receipt that lies in it; says what became of the fixed
    copy.

    changed: files of the fixed copy that are no longer what the receipt says; with any, the copy is kept as
    NAME.after-fix. A kill at any moment is finished by `recover`. Raises PlanRefused, MachineError.
    """
    if receipt.get("kept") != kept_name(path).name:
        raise PlanRefused(
            f"{path}: was written with -o, so its source was never changed and there is nothing to put back.",
            f"Delete {path} to be rid of it; what --overwrite replaced cannot be brought back.",
        )
    kept, after = kept_name(path), after_name(path)
    if not kept.is_dir():
        raise PlanRefused(f"{kept}: is not there; what the fix replaced was removed, and nothing else holds it.")
    if os.path.lexists(after):
        raise PlanRefused(f"{after}: exists; the fixed copy would be moved there.", "Move or delete it.")
    try:
        _write_journal(_journal(path), {"pid": os.getpid(), "old": _inode(kept), "new": _inode(path), "undo": changed})
        if exchange(kept, path):
            os.rename(kept, after)
        else:
            os.rename(path, after)
            os.rename(kept, path)
        sync_folder(path.parent)
        done = _settle(path, after, changed)
        os.unlink(_journal(path))
    except OSError as error:
        raise MachineError(
            f"{error.filename or path}: {error.strerror}.",
            f"Run `doctor undo {path}` again: it goes on where it stopped.",
        ) from error
    return done


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories' names in one step (renameat2); False where the kernel or the file system cannot."""
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
    """Make a directory's names survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_back(fd: int, offset: int, count: int) -> None:
    """Let the kernel begin to write these bytes to the disk, without waiting (sync_file_range). No promise: only fsync
    is one.
    """
    call = getattr(_libc(), "sync_file_range", None)
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.doctor-journal")


def _write_journal(journal: Path, record: dict) -> None:
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, json.dumps(record).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(journal.parent)


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _lives(pid: object) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
