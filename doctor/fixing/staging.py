"""The staging directory of an output: the output is whole or absent, and the source is never written to.

Everything is written into a directory beside the output, on the same file system. The caller then opens it, scans it
and calls `commit`: one rename. An error, Ctrl-C or a kill before that leaves no output; the next run removes what a
killed run left, and says so.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from doctor.core.errors import MachineError
from doctor.core.messages import Message, _
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.filesystem import create_file, exchange, lock_directory, machine_errors, sync_folder, write_all
from doctor.fixing.in_place import exchange_in_place
from doctor.fixing.outputs import check_in_place, check_output
from doctor.fixing.receipt import WrittenFile

SPARE_BYTES = 1 << 20  # left free for directory entries and the receipt


@dataclass
class StagingDir:
    """A staging directory under construction: `with open_staging(overlay, output) as staging`."""

    output: Path
    path: Path
    overwrite: bool = False
    in_place: bool = False
    progress: Callable[[int], None] = lambda n: None
    files: list[WrittenFile] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)  # what the user must be told
    not_carried: dict[str, str] = field(default_factory=dict)  # file of the source -> why it is not in the output
    committed: bool = False

    def add(self, name: str, data: bytes) -> None:
        """Write one small file, synced."""
        with machine_errors(self.path), create_file(self.path / name) as fd:
            write_all(fd, memoryview(data))
            os.fsync(fd)
        self.files.append(WrittenFile(name, "written", len(data)))
        self.progress(len(data))

    def commit(self) -> None:
        """Sync the directory and rename it to the output, which is complete from then on."""
        with machine_errors(self.output):
            for folder, _folders, _files in os.walk(self.path):
                sync_folder(folder)
            if self.in_place:
                exchange_in_place(self.path, self.output)
            elif os.path.lexists(self.output):
                self._replace()
            else:
                os.rename(self.path, self.output)
            self.committed = True
        try:
            sync_folder(self.output.parent)
        except OSError as error:
            self.notes.append(
                _(
                    "{path}: {error}; the output is complete, but a power cut now could still lose it",
                    path=self.output.parent,
                    error=error.strerror,
                )
            )

    def _replace(self) -> None:
        if not os.listdir(self.output):
            os.rename(self.path, self.output)  # rename(2) takes an empty directory's place
        elif not self.overwrite:
            raise MachineError(
                _("{path}: another program created it during this run.", path=self.output),
                _("Choose another output."),
            )
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


@contextlib.contextmanager
def open_staging(
    overlay: EditedCheckpoint,
    output: str | os.PathLike,
    *,
    copy: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[StagingDir]:
    """A staging directory for `output`, removed at the end unless it was committed.

    progress gets the bytes of each step. Raises PlanRefused for an output that may not be written, MachineError for a
    disk that is too small or fails.
    """
    output = Path(os.path.abspath(output))
    if in_place:
        check_in_place(overlay.source, output)
    else:
        check_output(overlay.source, output, overwrite)
    with machine_errors(output):
        os.makedirs(output.parent, exist_ok=True)
        notes = clean_stale(output)
        need = bytes_needed(overlay, output.parent, copy)
        disk = os.statvfs(output.parent)
        free = disk.f_bavail * disk.f_frsize
        if need + SPARE_BYTES > free:
            raise MachineError(
                _(
                    "{path}: {free:,} bytes are free; {need:,} will be written.",
                    path=output.parent,
                    free=free,
                    need=need + SPARE_BYTES,
                ),
                _(
                    "Free some space, or choose an output on the file system of the source, "
                    "where unchanged files are only linked."
                ),
            )
        path = _staging_path(output, os.getpid())
        os.mkdir(path)
    staging = StagingDir(output, path, overwrite, in_place, progress, notes=notes)
    lock = None
    try:
        with machine_errors(output):
            lock = lock_directory(path)
        yield staging
    finally:
        if lock is not None:
            os.close(lock)
        if not staging.committed:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def open_fetch(output: Path) -> Iterator[Path]:
    """A directory beside `output` for downloads, so that their files are linked into the staging directory, not
    copied.
    """
    parent = next(p for p in output.parents if p.is_dir())
    with machine_errors(parent):
        if parent == output.parent:
            clean_stale(output)
        path = parent / f".{output.name}.doctor-fetch-{os.getpid()}"
        os.mkdir(path)
        lock = lock_directory(path)
    try:
        yield path
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def bytes_needed(overlay: EditedCheckpoint, parent: Path, copy: bool) -> int:
    """Bytes of new disk space: the changed files, and the others where they cannot be linked."""
    need = sum(overlay.entries[n].size for n in overlay.changed if n in overlay.entries)
    device = os.stat(parent).st_dev
    for name, entry in overlay.entries.items():
        if name not in overlay.changed and (copy or os.stat(overlay.source.path(name)).st_dev != device):
            need += entry.size
    return need


def clean_stale(output: Path) -> list[Message]:
    """Remove what killed runs left beside the output; put back an output that one had moved aside. Returns what was
    done.
    """
    notes: list[Message] = []
    prefix = f".{output.name}.doctor-"
    for name in sorted(os.listdir(output.parent)):
        kind, _dash, pid = name.removeprefix(prefix).partition("-")
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
            notes.append(
                _("{path} was moved aside by a run that was killed (process {pid}); it is back", path=output, pid=pid)
            )
        else:
            shutil.rmtree(path, ignore_errors=True)
            notes.append(_("removed {name}, left by a run that was killed (process {pid})", name=path.name, pid=pid))
    return notes


def _staging_path(output: Path, pid: int) -> Path:
    return output.parent / f".{output.name}.doctor-stage-{pid}"


def _aside(output: Path) -> Path:
    return output.parent / f".{output.name}.doctor-old-{os.getpid()}"


def _is_dead(path: Path, pid: int) -> bool:
    """Whether no such process runs here, and none elsewhere (on a shared file system) holds the directory's lock."""
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    fd = lock_directory(path)
    if fd is None:
        return False
    os.close(fd)
    return True
