"""The staging directory of a run: parts, each with its sha256 in a journal, until the output is whole. Needs no torch.

A finished layer is one part file, written beside its name, synced, renamed, and then named in the journal with the hash
of its bytes. So a part that the journal names is whole, and a later run can tell whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, PlanRefused
from doctor.core.messages import Message, _, plural
from doctor.fixing.filesystem import machine_errors, sync_folder
from doctor.fixing.lock import hold
from doctor.fixing.outputs import check_output
from doctor.fixing.receipt import RECEIPT

JOURNAL = "journal.jsonl"
TUNING = "tuning.safetensors"  # the state of a tuning after the last layer (tuning/saved.py)
SPARE_BYTES = 1 << 20  # left free for the journal and directory entries
KEPT = _("Finished layers are kept: run again with --resume.")
FREE_SPACE = _("Free space there and run again with --resume; finished layers are kept.")


def stage_of(destination: Path) -> Path:
    """The staging directory of a run with this destination."""
    return destination.parent / f".{destination.name}.doctor-quantize"


def left_by(destination: Path) -> list[dict]:
    """The journal of an interrupted run with this destination, [] where there is none."""
    return Stage(destination).notes()


def require_no_work(destination: Path) -> None:
    """Raises PlanRefused where an interrupted run left finished layers, which a run from the start would delete."""
    entries = left_by(destination)
    layers = {entry["block"] for entry in entries if isinstance(entry.get("block"), int)}
    shards = {entry["shard"] for entry in entries if isinstance(entry.get("shard"), str)}
    if shards:
        raise PlanRefused(
            plural(
                "{path}: holds {n} finished shard of an interrupted run.",
                "{path}: holds {n} finished shards of an interrupted run.",
                len(shards),
                path=stage_of(destination),
            ),
            _("Go on with --resume; to start anew, delete that directory."),
        )
    if layers:
        raise PlanRefused(
            plural(
                "{path}: holds {n} finished layer of an interrupted run.",
                "{path}: holds {n} finished layers of an interrupted run.",
                len(layers),
                path=stage_of(destination),
            ),
            _("Go on with --resume; to start anew, delete that directory."),
        )


def refuse_output(
    source: Checkpoint,
    output: str | os.PathLike,
    overwrite: bool = False,
    resume: bool = False,
    preflight: bool = False,
    retry_failed: bool = False,
    **_others: Any,
) -> None:
    """Raises PlanRefused for an output that a run with these options of `quantize` would refuse, before any work."""
    destination = Path(os.path.abspath(output))
    check_output(source, destination, overwrite or retry_failed)
    if retry_failed and not (destination / RECEIPT).is_file():
        raise PlanRefused(
            _("{path}: holds no {receipt} of a run of `doctor quantize`.", path=destination, receipt=RECEIPT),
            _("Give the output of such a run; an interrupted one goes on with --resume alone."),
        )
    if preflight or int(os.environ.get("RANK", "0")):
        return
    with hold(destination):
        if not resume:
            require_no_work(destination)


class Stage:
    """A staging directory. `open`, then `write_part` and `note`. `damaged` names parts that an interrupted run finished
    and that are no longer what it wrote; they are gone.
    """

    def __init__(self, destination: Path):
        self.destination = destination
        self.stage = stage_of(destination)
        self.damaged: list[str] = []

    def begin(self, fingerprint: dict, resume: bool) -> None:
        """Take up what an interrupted run of the same fingerprint left, or start anew. Raises PlanRefused where it is
        of another run, or has work that would be lost, MachineError.
        """
        with machine_errors(self.stage, _("Check the permissions and the free space there.")):
            if resume and self.notes():  # without a line, a run was killed before or after it had work to keep
                self._require_same(fingerprint)
                self._cut_journal()
                self._verify()
                return
            require_no_work(self.destination)
            if self.stage.exists():
                shutil.rmtree(self.stage)
            self.stage.mkdir(parents=True)
        self.note({"fingerprint": fingerprint})

    def _require_same(self, fingerprint: dict) -> None:
        before = self.notes()[0].get("fingerprint")
        now = json.loads(json.dumps(fingerprint))
        if before != now:
            differs = differences(before if isinstance(before, dict) else {}, now)
            raise PlanRefused(
                _(
                    "{path}: the interrupted run differs in {what}.",
                    path=self.stage,
                    what=", ".join(differs) or "its fingerprint",
                ),
                _("Resume with the same checkpoint, recipe, text and versions; to start anew, delete that directory."),
            )

    def _cut_journal(self) -> None:
        """Without the line that a crash cut short: the next line would otherwise be glued to it."""
        whole = "".join(json.dumps(entry) + "\n" for entry in self.notes())
        beside = self.stage / f"{JOURNAL}.tmp"
        beside.write_text(whole, encoding="utf-8")
        os.rename(beside, self.stage / JOURNAL)

    def _verify(self) -> None:
        """Compare each part with its hash in the journal, and remove those that differ."""
        for name, digest in self.sealed().items():
            path = self.part(name)
            if not path.is_file() or path.is_symlink() or sha256_of(path) != digest:
                path.unlink(missing_ok=True)
                self.damaged.append(name)
        for name in self.damaged:
            self.note({"part": name, "sha256": None})

    def part(self, name: str) -> Path:
        return self.stage / f"part-{name}.safetensors"

    def sealed(self) -> dict[str, str]:
        """Part -> sha256 of every part that was finished."""
        found = {e["part"]: e.get("sha256") for e in self.notes() if isinstance(e.get("part"), str)}
        return {name: digest for name, digest in found.items() if isinstance(digest, str)}

    def has_part(self, name: str) -> bool:
        return name in self.sealed() and self.part(name).exists()

    def bytes_there(self) -> int:
        """Bytes of all parts."""
        return sum(path.stat().st_size for path in self.stage.glob("part-*.safetensors"))

    def seal(self, name: str, size: int, write: Callable[[BinaryIO], None]) -> None:
        """One part of about `size` bytes, whole or absent: written beside, synced, renamed, named in the journal.
        Raises MachineError.
        """
        path = self.part(name)
        beside = path.with_suffix(".tmp")
        require_room(self.stage, size)
        with machine_errors(path, FREE_SPACE):
            with open(beside, "wb") as file:
                hashed = HashedFile(file)
                write(hashed)  # type: ignore[arg-type]  # it only writes
                file.flush()
                os.fsync(file.fileno())
            os.rename(beside, path)
            sync_folder(self.stage)
        self.note({"part": name, "sha256": hashed.digest.hexdigest()})

    def note(self, entry: dict) -> None:
        """Append one line to the journal, synced. Raises MachineError."""
        path = self.stage / JOURNAL
        with machine_errors(path, FREE_SPACE), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def notes(self) -> list[dict]:
        """Journal lines that are whole; a line cut by a crash is not."""
        found: list[dict] = []
        path = self.stage / JOURNAL
        if not path.is_file():
            return found
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            found.append(entry)
        return found

    def discard(self) -> None:
        """Remove the stage."""
        shutil.rmtree(self.stage, ignore_errors=True)


class HashedFile:
    """A file open for writing, and the sha256 of what was written to it."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._file.write(data)


def copy_hashed(source: BinaryIO, target: BinaryIO, skip: int) -> str:
    """Copy a file from byte `skip` on; returns the sha256 of all of it."""
    digest = hashlib.sha256(source.read(skip))
    while part := source.read(1 << 20):
        digest.update(part)
        target.write(part)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def require_room(folder: Path, need: int) -> None:
    """Raises MachineError where `need` more bytes do not fit."""
    with machine_errors(folder, FREE_SPACE):
        free = free_bytes(folder)
    if need + SPARE_BYTES > free:
        raise MachineError(
            _("{path}: {free:,} bytes are free; {need:,} will be written next.", path=folder, free=free, need=need),
            FREE_SPACE,
        )


def damage_note(name: str) -> Message:
    """What is said of a part that is no longer what was written."""
    return _("part {name}: is damaged or absent (its sha256 differs); it is made again", name=name)


def differences(before: dict, now: dict) -> list[str]:
    """Names of what differs; for the recipe, its fields and both values."""
    found = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += [f"{key} ({k} was {old.get(k)}, is {v})" for k, v in value.items() if old.get(k) != v]
        elif old != value:
            found.append(key)
    return found
