"""A fix in place, and its undo: two directories exchange names in one step, and neither is ever written into.

NAME becomes the fixed checkpoint and NAME.before-fix the old one. A journal beside them, synced before the first
rename, names both directories by inode, so that the next run can finish or take back the exchange from any state
between:

    before the exchange  NAME = old               the staging directory and the new NAME.before-fix are removed
    after it             NAME = new               the journal is removed
    between two renames  NAME is absent           NAME.before-fix = old takes its name again

Whoever changes any of them holds the lock of NAME (lock.py), so a journal that is found there is of a run that ended.

Where the kernel can exchange names (renameat2), the third state does not occur. An undo keeps the same journal (with
the key `undo`) and has the same states seen from the other side: old is the former NAME.before-fix, new the fixed copy,
which passes through NAME.after-fix.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from doctor.checkpoint.regular import read_regular
from doctor.core.errors import DoctorError, MachineError, PlanRefused
from doctor.core.messages import Message, _
from doctor.fixing.filesystem import exchange, machine_errors, sync_folder
from doctor.fixing.lock import hold

MAX_JOURNAL_BYTES = 64 << 20


def kept_name(path: Path) -> Path:
    """Where a fix in place keeps the checkpoint that it replaces."""
    return path.with_name(path.name + ".before-fix")


def after_name(path: Path) -> Path:
    """Where an undo keeps a fixed copy that was changed after the fix."""
    return path.with_name(path.name + ".after-fix")


def exchange_in_place(stage: Path, path: Path) -> None:
    """`stage` becomes `path`, and the old `path` is kept beside it. On OSError `path` is as it was, or `recover`
    restores it.
    """
    kept, journal = kept_name(path), _journal(path)
    _write_journal(journal, {"old": _inode(path), "new": _inode(stage)})
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


def recover(path: Path) -> list[Message]:
    """Finish or take back what a killed run left half done; returns what was done, [] where there is no journal. Raises
    PlanRefused while another run works on `path`, MachineError.
    """
    journal, kept = _journal(path), kept_name(path)
    if not os.path.lexists(journal):
        return []
    with hold(path), machine_errors(journal, _("Run the command again: it resumes where it stopped.")):
        record = _record(journal)
        notes: list[Message] = []
        if record is not None:
            notes = (
                _finish_undo(path, record)
                if "undo" in record
                else _finish_exchange(path, kept, record["old"], record["new"])
            )
            sync_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(journal)
    return notes


def _record(journal: Path) -> dict[str, Any] | None:
    """What a journal says; None where it is cut short or no journal: it is synced before anything is renamed, so then
    nothing was renamed.
    """
    try:
        record = json.loads(read_regular(journal, MAX_JOURNAL_BYTES))
    except (OSError, ValueError, RecursionError, DoctorError):
        return None
    if not isinstance(record, dict) or not all(isinstance(record.get(k), int) for k in ("old", "new")):
        return None
    changed = record.get("undo", [])
    return record if isinstance(changed, list) and all(isinstance(n, str) for n in changed) else None


def _finish_exchange(path: Path, kept: Path, old: int, new: int) -> list[Message]:
    notes: list[Message] = []
    if not os.path.lexists(path) and _inode(kept) == old:
        os.rename(kept, path)
        notes.append(_("{path}: a fix in place was killed; the old checkpoint is back", path=path))
    elif _inode(path) == old and _inode(kept) == new:
        shutil.rmtree(kept, ignore_errors=True)
        notes.append(
            _("{path}: a fix in place was killed before it took effect; what it had written is removed", path=path)
        )
    return notes


def _finish_undo(path: Path, record: dict[str, Any]) -> list[Message]:
    """From any state between: where nothing was renamed, nothing happens; else the undo is finished."""
    kept, after = kept_name(path), after_name(path)
    if _inode(path) == record["new"]:
        return []
    if not os.path.lexists(path) and _inode(kept) == record["old"]:
        os.rename(kept, path)
    if _inode(kept) == record["new"]:
        os.rename(kept, after)
    settled = _settle(path, after, record["undo"])
    return [_("{path}: an undo was killed; it is finished. {result}", path=path, result=settled)]


def _settle(path: Path, after: Path, changed: list[str]) -> Message:
    """Keep or remove the fixed copy, once NAME is the old checkpoint again; returns which."""
    if changed:
        return _(
            "{path} is as it was before the fix. The fixed copy was changed since ({files}), so it is kept as {kept}",
            path=path,
            files=and_more(changed),
            kept=after,
        )
    shutil.rmtree(after, ignore_errors=True)
    return _("{path} is as it was before the fix. The fixed copy matched its receipt and is removed", path=path)


def and_more(names: list[str]) -> Message | str:
    """The first name, and how many more there are."""
    return _("{name} and {n:,} more", name=names[0], n=len(names) - 1) if len(names) > 1 else names[0]


def require_kept(path: Path, receipt: dict[str, Any]) -> None:
    """Raises PlanRefused where the receipt in `path` is not of a fix in place, or what it replaced is gone."""
    kept, after = kept_name(path), after_name(path)
    if receipt.get("kept") != kept.name:
        raise PlanRefused(
            _("{path}: was written with -o, so its source was never changed and nothing can be undone.", path=path),
            _("Delete {path} to remove it; what --overwrite replaced cannot be restored.", path=path),
        )
    if os.path.islink(kept) or not kept.is_dir():
        raise PlanRefused(_("{path}: does not exist; what the fix replaced was deleted.", path=kept))
    if os.path.lexists(after):
        raise PlanRefused(
            _("{path}: exists; the fixed copy would be moved there.", path=after), _("Move or delete it.")
        )


def undo(path: Path, changed: list[str]) -> Message:
    """Put back what a fix in place replaced; the caller holds `path` and has asked `require_kept`. Returns what became
    of the fixed copy.

    changed: files of the fixed copy that no longer match the receipt; with any, the copy is kept as NAME.after-fix.
    `recover` finishes an undo that was killed. Raises MachineError.
    """
    kept, after = kept_name(path), after_name(path)
    try:
        _write_journal(_journal(path), {"old": _inode(kept), "new": _inode(path), "undo": changed})
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
            _("{path}: {error}.", path=error.filename or path, error=error.strerror),
            _("Run `doctor undo {path}` again: it resumes where it stopped.", path=path),
        ) from error
    return done


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.doctor-journal")


def _write_journal(journal: Path, record: dict[str, Any]) -> None:
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, json.dumps(record).encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(journal.parent)


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino  # of a link, not of what it leads to
    except FileNotFoundError:
        return None
