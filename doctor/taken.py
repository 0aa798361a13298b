"""A checkpoint of which some files are another's: what the edits TakeFile make, before any other edit sees it.

Shards, JSON texts and the listing are those that the directory would have with the files in it, so the view edits, scans and
writes a shard that came from a base model like one of its own. No byte is copied here.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from doctor.checkpoint import INDEX_NAME, Checkpoint, Entry, JsonFile
from doctor.edits import TakeFile
from doctor.errors import PlanRefused
from doctor.made import STALE, opened
from doctor.shard import ShardFile


class WithFiles(Checkpoint):
    """`source` with whole files of other checkpoints. Raises PlanRefused where one of them is not there."""

    def __init__(self, source: Checkpoint, edits: Iterable[TakeFile]):
        super().__init__(source.root, source.only)
        self.source, self.donors = source, {e.file: opened(e.root) for e in edits}
        for name, donor in self.donors.items():
            if name not in donor.entries:
                raise PlanRefused(f"{name}: {donor.name} has no such file.", STALE)
        self.entries = {**source.entries, **{n: Entry(n, d.entries[n].size) for n, d in self.donors.items()}}
        self.problems = [p for p in source.problems if p.tensor not in self.donors]
        self.json = {**source.json, **{n: JsonFile(n, d.read_file(n)) for n, d in self.donors.items() if n.endswith(".json")}}
        self._place_shards(source)

    def _place_shards(self, source: Checkpoint) -> None:
        """The shards that a reader takes: those of the index, else all."""
        listed = [n for n in self.entries if n.endswith(".safetensors")]
        wanted = sorted(set(self.weight_map.values())) if INDEX_NAME in self.donors or source.weight_map else listed
        self.missing_shards = [n for n in wanted if n not in self.entries]
        known = dict(source.shards)
        for name, donor in self.donors.items():
            if name.endswith(".safetensors"):
                known[name] = replace(donor.shards[name]) if name in donor.shards else self._open_shard(name)
        names = [n for n in wanted if n in self.entries]
        self.shards = {n: known[n] if n in known else self._open_shard(n) for n in names}

    def path(self, name: str) -> Path:
        donor = self.donors.get(name)
        return Path(os.path.realpath(donor.path(name))) if donor is not None else super().path(name)

    def read_file(self, name: str, limit: int = 64 << 20) -> bytes:
        donor = self.donors.get(name)
        return donor.read_file(name, limit) if donor is not None else super().read_file(name, limit)

    def open_file(self, shard: str) -> ShardFile:
        donor = self.donors.get(shard)
        return donor.open_file(shard) if donor is not None else super().open_file(shard)
