"""A Hub repository as a donor: `fix --from org/name` fetches the tensors and files it takes, and nothing else."""

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from doctor.checkpoint.hub import HubCheckpoint
from doctor.checkpoint.safetensors import ShardFile
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _

FETCH_BYTES = 16 << 20  # of one request for a tensor or a file: the most that a broken connection loses


class HubDonor(HubCheckpoint):
    """A Hub repository as a donor of tensors and files: fetches only what is asked for.

    Each part is fetched once into `folder`, as sparse files of the shards' sizes, and read from there; the caller
    removes the folder. A whole file is checked against the hash that the Hub states. One tensor is a range of its
    shard, which no hash covers: its digest goes into the receipt.
    """

    unread = ""

    def __init__(self, source: HubCheckpoint, folder: Path) -> None:
        super().__init__(source.requests.repo, source.revision)
        for name in ("commit", "lfs_sha256", "entries", "problems", "json", "shards", "missing_shards"):
            setattr(self, name, getattr(source, name))
        self.folder = folder
        self.progress: Callable[[int], None] = lambda n: None
        self._fetched: dict[str, set[tuple[int, int]]] = {}
        self._whole: set[str] = set()
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """The repository at this commit, as edits and receipts name it."""
        return f"hf://{self.requests.repo}@{self.commit}"

    def path(self, name: str) -> Path:
        """The whole file, fetched. Raises BadCheckpoint if its hash is not the Hub's, MachineError for the network."""
        if name not in self.entries:
            raise BadCheckpoint(_("{file}: not a file of {checkpoint}.", file=name, checkpoint=self.name))
        self.fetch(name, 0, self.entries[name].size)
        with self._lock:
            if name not in self._whole:
                self._check(name)
                self._whole.add(name)
        return self.folder / name

    def _check(self, name: str) -> None:
        with open(self.folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        stated = self.sha256(name)
        if found != stated:
            raise BadCheckpoint(
                _(
                    "{checkpoint}: {file} arrived with sha256 {found}; the Hub states {stated}.",
                    checkpoint=self.name,
                    file=name,
                    found=found,
                    stated=stated,
                ),
                _("Nothing was kept. Run it again."),
            )

    def open_file(self, shard: str) -> ShardFile:
        self._place(shard)
        return _FetchedShard(self, shard)

    def fetch(self, name: str, begin: int, end: int) -> None:
        """Fetch bytes [begin, end) of a file into the folder. Raises MachineError, BadCheckpoint."""
        with self._lock:
            done = self._fetched.setdefault(name, set())
            if any(a <= begin and end <= b for a, b in done):
                return
            self._place(name)
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for at in range(begin, end, FETCH_BYTES):
                    count = min(FETCH_BYTES, end - at)
                    data = self.requests.read(self._url(name), name, at, count)[0]
                    if len(data) != count:
                        raise BadCheckpoint(
                            _(
                                "{checkpoint}: {file} ends at byte {byte:,}; the Hub lists {size:,} bytes.",
                                checkpoint=self.name,
                                file=name,
                                byte=at + len(data),
                                size=self.entries[name].size,
                            )
                        )
                    os.pwrite(fd, data, at)
                    self.progress(count)
            finally:
                os.close(fd)
            done.add((begin, end))

    def _place(self, name: str) -> None:
        """Create the file in the folder, sparse and of its full size, if it is not there yet."""
        with open(self.folder / name, "ab") as file:
            file.truncate(self.entries[name].size)


class _FetchedShard(ShardFile):
    """A shard that fetches each tensor, as one range, before its bytes are read."""

    def __init__(self, donor: HubDonor, name: str):
        super().__init__(donor.folder / name, name)
        self._donor = donor
        self._tensors = donor.shards[name].tensors

    def _fetch(self, begin: int, end: int) -> None:
        for info in self._tensors:
            if info.begin < end and begin < info.end:
                self._donor.fetch(self.name, info.begin, info.end)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._fetch(offset, offset + len(buffer))
        super().read_into(offset, buffer)

    def read(self, offset: int, n: int) -> bytes:
        self._fetch(offset, offset + n)
        return super().read(offset, n)
