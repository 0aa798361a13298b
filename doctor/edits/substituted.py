"""Checkpoint views with files substituted from a donor or renamed: TakeFile and RenameFile, applied before all other
edits.

Shards, JSON texts and the listing are those that the directory would have with the files in it, so the overlay edits,
scans and writes a donor's shard, or a renamed one, like any of its own. No byte is copied here.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from doctor.checkpoint import json_text
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint, Entry, JsonFile
from doctor.checkpoint.safetensors import ShardFile
from doctor.core.messages import _
from doctor.edits.donor_registry import open_donor
from doctor.edits.kinds import RenameFile, TakeFile
from doctor.edits.stale import stale


class SubstitutedFiles(Checkpoint):
    """`source` with whole files of donors. Raises PlanRefused where a donor lacks one."""

    def __init__(self, source: Checkpoint, edits: Iterable[TakeFile]):
        super().__init__(source.root, source.only)
        self.source, self.donors = source, {e.file: open_donor(e.root) for e in edits}
        for name, donor in self.donors.items():
            if name not in donor.entries:
                raise stale(_("{file}: {donor} has no such file.", file=name, donor=donor.name))
        self.entries = {**source.entries, **{n: Entry(n, d.entries[n].size) for n, d in self.donors.items()}}
        self.problems = [p for p in source.problems if p.tensor not in self.donors]
        self.json = {
            **source.json,
            **{n: JsonFile(n, d.read_file(n)) for n, d in self.donors.items() if n.endswith(".json")},
        }
        self._place_shards(source)

    def _place_shards(self, source: Checkpoint) -> None:
        """The shards that a reader loads: those of the index, else all."""
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


class RenamedFiles(Checkpoint):
    """`source` with weight files renamed; the index follows. Raises PlanRefused where a name is not free or a file is
    absent.
    """

    def __init__(self, source: Checkpoint, edits: Iterable[RenameFile]):
        super().__init__(source.root, source.only)
        self.source, self.names = source, {e.file: e.to for e in edits}
        self._check()
        self._old = {new: old for old, new in self.names.items()}
        new = self.names.get
        self.entries = {n: replace(e, name=n) for n, e in sorted((new(n, n), e) for n, e in source.entries.items())}
        self.problems, self.missing_shards = list(source.problems), list(source.missing_shards)
        self.json = dict(source.json)
        index = source.json.get(INDEX_NAME)
        if index is not None and self.names.keys() & set(source.weight_map.values()):
            text = json_text.replace_strings(index.raw.decode("utf-8"), json_text.pointer("weight_map"), self.names)
            self.json[INDEX_NAME] = JsonFile(INDEX_NAME, text.encode("utf-8"))
            self.entries[INDEX_NAME] = Entry(INDEX_NAME, len(self.json[INDEX_NAME].raw))
        self.shards = {
            new(n, n): replace(s, name=new(n, n), tensors=[t._replace(shard=new(n, n)) for t in s.tensors])
            for n, s in source.shards.items()
        }

    def _check(self) -> None:
        source, given = self.source, list(self.names.values())
        # The index uses the name of a missing shard for other tensors.
        others = {*source.entries, *source.missing_shards} - self.names.keys()
        for old, to in self.names.items():
            if old not in source.shards or source.only:
                raise stale(_("{file}: not a weight file of this checkpoint.", file=old))
            if not to.endswith(".safetensors") or os.path.basename(to) != to or "\\" in to or to.startswith("."):
                raise stale(_("{file}: {name} is not a valid name of a weight file.", file=old, name=repr(to)))
            if to in others or given.count(to) > 1:
                raise stale(_("{file}: its new name {name} belongs to another file.", file=old, name=to))

    def origin(self, name: str) -> str:
        return self.source.origin(self._old.get(name, name))

    def path(self, name: str) -> Path:
        if name not in self.entries:
            return super().path(name)
        return self.source.path(self._old.get(name, name))

    def read_file(self, name: str, limit: int = 64 << 20) -> bytes:
        file = self.json.get(name)
        return file.raw if file is not None else self.source.read_file(self._old.get(name, name), limit)

    def open_file(self, shard: str) -> ShardFile:
        return self.source.open_file(self._old.get(shard, shard))
