"""The staging directory of an output: the output is whole or absent, and the source is never written to.

Everything is written into a directory beside the output, on the same file system. The caller then opens it, scans it
and calls `commit`: one rename. An error, Ctrl-C or a kill before that leaves no output; the next run removes what a
killed run left, and says so. One run an output: a lock file beside it (lock.py) keeps others away from the first look
to the rename.
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
from doctor.fixing.filesystem import Carry, create_file, exchange, machine_errors, reflink, sync_folder, write_all
from doctor.fixing.in_place import exchange_in_place
from doctor.fixing.lock import hold
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
            aside = _beside(self.output, "old")
            os.rename(self.output, aside)
            try:
                os.rename(self.path, self.output)
            except BaseException:
                os.rename(aside, self.output)
                raise
            self.committed = True
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def hold_output(output: Path) -> Iterator[list[Message]]:
    """Keep other runs away from an output, after removing what killed runs left beside it; the value says what was
    removed. The same thread may do so again inside, and removes nothing then. Raises PlanRefused, MachineError.
    """
    output = Path(os.path.abspath(output))
    with hold(output) as first:
        with machine_errors(output):
            notes = clean_stale(output) if first else []
        yield notes


@contextlib.contextmanager
def open_staging(
    overlay: EditedCheckpoint,
    output: str | os.PathLike,
    *,
    carry: Carry = Carry.AUTO,
    overwrite: bool = False,
    in_place: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[StagingDir]:
    """A staging directory for `output`, removed at the end unless it was committed.

    progress gets the bytes of each step. Raises PlanRefused for an output that may not be written, or that another run
    is writing, MachineError for a disk that is too small or fails.
    """
    output = Path(os.path.abspath(output))
    if in_place:
        check_in_place(overlay.source, output)
    else:
        check_output(overlay.source, output, overwrite)
    with hold_output(output) as notes:
        path = _beside(output, "stage")
        with machine_errors(output):
            os.mkdir(path)
        staging = StagingDir(output, path, overwrite, in_place, progress, notes=notes)
        try:
            with machine_errors(output):
                _require_room(output.parent, bytes_needed(overlay, path, carry, in_place))
            yield staging
        finally:
            if not staging.committed:
                shutil.rmtree(path, ignore_errors=True)


def _require_room(folder: Path, need: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if need + SPARE_BYTES > free:
        raise MachineError(
            _("{path}: {free:,} bytes are free; {need:,} will be written.",
              path=folder, free=free, need=need + SPARE_BYTES),
            _("Free some space, or choose an output on another disk; --link shares unchanged files with the source."),
        )  # fmt: skip


@contextlib.contextmanager
def open_fetch(output: Path) -> Iterator[Path]:
    """A directory beside `output` for downloads, so that their files are linked into the staging directory, not
    copied.
    """
    parent = next(p for p in output.parents if p.is_dir())
    with hold_output(output) if parent == output.parent else contextlib.nullcontext():
        path = parent / f".{output.name}.doctor-fetch"
        with machine_errors(parent):
            os.mkdir(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def bytes_needed(overlay: EditedCheckpoint, stage: Path, carry: Carry, in_place: bool = False) -> int:
    """Bytes of new disk space: the changed files, and the others where they neither share blocks nor are linked.

    stage: an empty directory on the output's disk, in which it is tried whether files can share blocks. A run killed
    at that leaves no file that the next one would not remove.
    """
    need = sum(overlay.entries[n].size for n in overlay.changed if n in overlay.entries)
    others = {n: os.path.realpath(overlay.source.path(n)) for n in overlay.entries if n not in overlay.changed}
    device, shares = os.stat(stage).st_dev, False
    largest = max(others, key=lambda n: overlay.entries[n].size, default=None)
    if largest is not None and carry is Carry.AUTO:
        probe = stage / "probe"
        shares = reflink(others[largest], probe)
        probe.unlink(missing_ok=True)
    for name, path in others.items():
        same_disk = os.stat(path).st_dev == device
        if not shares and not (same_disk and carry.links(overlay.entries[name].size, in_place)):
            need += overlay.entries[name].size
    return need


def clean_stale(output: Path) -> list[Message]:
    """Remove what killed runs left beside the output, which the caller holds; put back an output that one had moved
    aside. Returns what was done.
    """
    notes: list[Message] = []
    for kind in ("old", "stage", "fetch"):
        path = _beside(output, kind)
        if not os.path.lexists(path):
            continue
        if kind == "old" and not os.path.lexists(output):
            os.rename(path, output)
            notes.append(_("{path} was moved aside by a run that was killed; it is back", path=output))
        else:
            shutil.rmtree(path)
            notes.append(_("removed {name}, left by a run that was killed", name=path.name))
    return notes


def is_fetched(path: str) -> bool:
    """Whether a file is a download of this run, which disappears at its end."""
    return Path(path).parent.name.endswith(".doctor-fetch")


def _beside(output: Path, kind: str) -> Path:
    """Where a run keeps what is not yet, or no longer, the output: one name a kind, since one run holds it."""
    return output.parent / f".{output.name}.doctor-{kind}"
