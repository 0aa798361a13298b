"""A checkpoint read through edits: what a fix would write, without writing it.

Scan, rules, quantizer and staging take an EditedCheckpoint like any other. Its listing, JSON texts, headers and shard
bytes are those that a fix writes, so a finding on the overlay points at places in the fixed files.

Edits are checked against the files here: one that expects another value, tensor or shape than the files hold raises
PlanRefused.
"""

import bisect
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from doctor.checkpoint import json_text
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint, Entry, JsonFile, is_numbered
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo, open_shard
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.messages import _
from doctor.edits.derived import derive
from doctor.edits.donor_registry import open_donor
from doctor.edits.json_edits import edited_text, json_shown
from doctor.edits.kinds import (
    CREATING,
    CleanJson,
    DropFile,
    DropTensor,
    Edit,
    NameFormat,
    Rebase,
    RebuildIndex,
    RemoveJson,
    RenameFile,
    RenameTensor,
    ReplaceText,
    SetJson,
    TakeFile,
    TensorEdit,
)
from doctor.edits.shard_layout import EditedFile, Piece, PlannedTensor, checked_info, lay_out
from doctor.edits.stale import stale
from doctor.edits.substituted import RenamedFiles, SubstitutedFiles


class EditedCheckpoint(Checkpoint):
    """`source` as it will be after `edits`. Nothing is written.

    changed: names of files whose content differs from the source's. substituted: those of them that are copied whole
    from a donor; `source` serves them already. changed_tensors: names of tensors that edits touch. Raises PlanRefused
    for an edit that does not fit the files.
    """

    carries_folders = True  # whether an output has the source's folders too

    def __init__(self, source: Checkpoint, edits: Iterable[Edit] = ()):
        self.edits = tuple(edits)
        other = next((e for e in self.edits if isinstance(e, Rebase)), None)
        source = open_donor(other.root) if other is not None else source
        files = [e for e in self.edits if isinstance(e, TakeFile)]
        source = SubstitutedFiles(source, files) if files else source
        renames = [e for e in self.edits if isinstance(e, RenameFile)]
        new_index = False
        self.new_names: dict[str, str] = {}  # file of the source -> its name here, where it is renamed
        if renames:
            renamed = RenamedFiles(source, renames)
            self.new_names = renamed.names
            self.edits = tuple(_by_new_name(e, renamed.names) for e in self.edits)
            new_index = renamed.json.get(INDEX_NAME) is not source.json.get(INDEX_NAME)
            source = renamed
        super().__init__(source.root, source.only)
        self.source = source
        self.entries = dict(source.entries)
        self.problems = list(source.problems)
        self.shards = dict(source.shards)
        self.json = dict(source.json)
        self.missing_shards = list(source.missing_shards)
        self.gguf = source.gguf
        self.substituted: set[str] = {self.new_name(e.file) for e in files}
        self.changed: set[str] = set(self.substituted)
        if new_index:
            self.changed.add(INDEX_NAME)
            self.substituted.discard(INDEX_NAME)
        self.changed_tensors: set[str] = set()
        self.pieces: dict[str, list[Piece]] = {}
        self.texts: dict[str, bytes] = {}  # changed files that are neither shards nor JSON
        self._names: list[str] = []
        self._edit_tensors()
        self._edit_json()
        self._drop_files()
        if any(isinstance(e, RebuildIndex) for e in self.edits):
            self._rebuild_index()
        else:
            if INDEX_NAME in self.changed:
                self._follow_index()
            if self.changed_tensors:
                self._correct_index()

    # tensors

    def _edit_tensors(self) -> None:
        by_tensor: dict[str, list[Edit]] = {}
        for edit in self.edits:
            if isinstance(edit, TensorEdit):
                by_tensor.setdefault(edit.tensor, []).append(edit)
        added: dict[str, list[str]] = {}
        for name, edits in by_tensor.items():
            if name not in self.source.tensors:
                if not any(isinstance(e, CREATING) for e in edits) or not self.source.shards:
                    raise stale(_("{tensor}: the checkpoint has no such tensor.", tensor=name))
                added.setdefault(self._home(name), []).append(name)
        self.changed_tensors = {
            *by_tensor,
            *(t.name for n in self.substituted & self.shards.keys() for t in self.shards[n].tensors),
        }
        self._check_names()
        again = {e.file for e in self.edits if isinstance(e, NameFormat)}
        for name in again - self.source.shards.keys():
            raise stale(_("{file}: not a weight file of this checkpoint.", file=name))
        for shard in list(self.source.shards.values()):
            if (
                shard.name in added
                or shard.name in again
                or any(_edits_in(shard.name, by_tensor.get(t.name, ())) for t in shard.tensors)
            ):
                self._edit_shard(shard, by_tensor, sorted(added.get(shard.name, [])))

    def _check_names(self) -> None:
        """New names must be free, or become free, and be given once."""
        renamed = {e.tensor: e.to for e in self.edits if isinstance(e, RenameTensor)}
        kept = self.source.tensors.keys() - renamed.keys()
        twice = [new for new, count in Counter(renamed.values()).items() if count > 1 or new in kept]
        if twice:
            raise stale(_("{tensor}: two tensors would have this name.", tensor=twice[0]))
        self.changed_tensors |= set(renamed.values())

    def _home(self, name: str) -> str:
        """The shard for a new tensor: that of the tensor with the longest common prefix, so that a layer stays
        together.
        """
        if not self.source.tensors:
            return max(self.source.shards)
        if not self._names:
            self._names = sorted(self.source.tensors)
        at = bisect.bisect(self._names, name)
        near = max(self._names[max(at - 1, 0) : at + 1], key=lambda other: len(_common_prefix(name, other)))
        return self.source.tensors[near].shard

    def _edit_shard(self, shard: Shard, by_tensor: dict[str, list[Edit]], added: list[str]) -> None:
        if shard.defects:
            raise PlanRefused(
                _(
                    "{file}: {defect}; a shard is rewritten only when every byte of it is accounted for.",
                    file=shard.name,
                    defect=shard.defects[0].detail,
                ),
                _("Copy the file again from where it came from, then run `doctor fix`."),
            )
        kept: list[tuple[TensorInfo | None, Sequence[Edit]]] = []
        for info in shard.tensors:
            edits = _edits_in(shard.name, by_tensor.get(info.name, ()))
            if not any(isinstance(e, DropTensor) for e in edits):
                kept.append((info, edits))
        kept += [(None, by_tensor[name]) for name in added]
        self.changed.add(shard.name)
        self.substituted.discard(shard.name)
        if not kept:
            del self.shards[shard.name], self.entries[shard.name]
            return
        new_shard, pieces = lay_out(shard, [self._planned(t, edits, shard.name) for t, edits in kept])
        self.shards[shard.name] = new_shard
        self.pieces[shard.name] = pieces
        self.entries[shard.name] = Entry(shard.name, new_shard.size)

    def _planned(self, info: TensorInfo | None, edits: Sequence[Edit], shard: str) -> PlannedTensor:
        name = next((e.tensor for e in edits if isinstance(e, TensorEdit)), "")
        derived = derive(self.source, name, edits) if edits else None
        if derived is not None:
            info = derived.info._replace(name=name, shard=shard)
        if info is None:
            raise stale(_("{tensor}: the checkpoint has no such tensor.", tensor=name))
        return PlannedTensor(info, checked_info(info, edits), edits, derived)

    # JSON

    def _drop_files(self) -> None:
        for edit in self.edits:
            if isinstance(edit, ReplaceText):
                self._replace_text(edit)
            if isinstance(edit, DropFile):
                if edit.file not in self.entries:
                    raise stale(_("{file}: not a file of this checkpoint.", file=edit.file))
                del self.entries[edit.file]
                self.json.pop(edit.file, None)
                self.shards.pop(edit.file, None)
                self.changed.add(edit.file)

    def _replace_text(self, edit: ReplaceText) -> None:
        if edit.file not in self.entries or edit.file in self.json or edit.file in self.shards:
            raise stale(_("{file}: not a text file of this checkpoint.", file=edit.file))
        text = self.source.read_file(edit.file)
        if edit.old.encode() not in text:
            raise stale(_("{file}: does not contain {text}.", file=edit.file, text=json_shown(edit.old)))
        self.texts[edit.file] = text.replace(edit.old.encode(), edit.new.encode(), 1)
        self.entries[edit.file] = Entry(edit.file, len(self.texts[edit.file]))
        self.changed.add(edit.file)

    def _edit_json(self) -> None:
        texts = {e.file: json_text.cleaned(self.text(e.file)) for e in self.edits if isinstance(e, CleanJson)}
        for edit in self.edits:
            if isinstance(edit, (SetJson, RemoveJson)):
                texts[edit.file] = edited_text(texts[edit.file] if edit.file in texts else self.text(edit.file), edit)
        for name, text in texts.items():
            self._put_json(name, text)

    def text(self, name: str) -> str:
        """Text of a JSON file, an empty object for an absent one. Raises PlanRefused for a broken one."""
        file = self.json.get(name)
        if file is None:
            if name in self.entries or "/" in name or not name.endswith(".json"):
                raise PlanRefused(_("{file}: not a JSON file of this checkpoint.", file=name))
            return "{}\n"
        if file.broken is not None:
            raise PlanRefused(
                _("{file}: {error}; a value can be set only in valid JSON.", file=name, error=str(file.broken)),
                _("Repair the file by hand first."),
            )
        return file.raw.decode("utf-8")

    def _put_json(self, name: str, text: str) -> None:
        raw = text.encode("utf-8")
        old = self.source.json.get(name)
        if old is not None and old.raw == raw:
            return
        self.json[name] = JsonFile(name, raw)
        self.entries[name] = Entry(name, len(raw))
        self.changed.add(name)
        self.substituted.discard(name)
        self.__dict__.pop("weight_map", None)

    # index

    def _follow_index(self) -> None:
        """The shards that an edited index names."""
        wanted = sorted(set(self.weight_map.values()))
        self.missing_shards = [n for n in wanted if n not in self.entries]
        self.shards = {n: self.shards.get(n) or open_shard(self.source.path(n), n) for n in wanted if n in self.entries}

    def _correct_index(self) -> None:
        """Correct sizes and tensor names in an index that is present; the rest of its text stays."""
        if self.index is None:
            return
        text = self.text(INDEX_NAME)
        for name in self.changed_tensors - self.tensors.keys():
            if name in self.weight_map:
                text = json_text.remove_value(text, json_text.pointer("weight_map", name))
        for name in (
            sorted(self.tensors.keys() - self.source.tensors.keys())
            if isinstance(self.index.get("weight_map"), dict)
            else ()
        ):
            text = json_text.set_value(text, json_text.pointer("weight_map", name), self.tensors[name].shard)
        metadata = self.index.get("metadata")
        for key, value in self._totals().items():
            if isinstance(metadata, dict) and key in metadata and metadata[key] != value:
                text = json_text.set_value(text, json_text.pointer("metadata", key), value)
        self._put_json(INDEX_NAME, text)

    def _totals(self) -> dict[str, int]:
        infos = self.tensors.values()
        return {"total_size": sum(t.nbytes for t in infos), "total_parameters": sum(t.numel for t in infos)}

    def _rebuild_index(self) -> None:
        """An index from the headers alone: every tensor in the shard that the old index names, else in the first that
        has it.
        """
        old_map, old_index = dict(self.weight_map), self.index or {}
        for name in self.entries:
            if name.endswith(".safetensors") and name not in self.shards:
                self.shards[name] = open_shard(self.source.path(name), name)
        self.__dict__.pop("tensors", None)
        names = sorted(self.shards)
        if any(is_numbered(n) for n in names):  # a consolidated model beside its own shards is none of them
            named = set(old_map.values())  # as is a shard of another name that the index lists
            names = [n for n in names if is_numbered(n) or n in named]
        weight_map: dict[str, str] = {}
        for shard in names:
            for info in self.shards[shard].tensors:
                if info.name not in weight_map or old_map.get(info.name) == shard:
                    weight_map[info.name] = shard
        self.shards = {n: self.shards[n] for n in names if n in set(weight_map.values())}
        self.missing_shards = []
        metadata = old_index.get("metadata")
        metadata = metadata if isinstance(metadata, dict) else {}
        document = {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))}
        self._put_json(INDEX_NAME, json_text.dumps(document, indent=2) + "\n")
        totals = self._totals()
        document["metadata"] |= {k: v for k, v in totals.items() if k == "total_size" or k in metadata}
        self._put_json(INDEX_NAME, json_text.dumps(document, indent=2) + "\n")

    # reading

    def origin(self, name: str) -> str:
        return self.source.origin(name)

    def new_name(self, name: str) -> str:
        """The name that a file of the source has here."""
        return self.new_names.get(name, name)

    def path(self, name: str) -> Path:
        """Path of a file that no edit changes. Raises BadCheckpoint for one that exists only as edits."""
        if name in self.changed:
            raise BadCheckpoint(
                _("{file}: its edits are not on disk; read it through the checkpoint, not by its path.", file=name)
            )
        return self.source.path(name) if name in self.entries else super().path(name)

    def read_file(self, name: str, limit: int = 64 << 20) -> bytes:
        if name in self.substituted or name not in self.changed:
            return self.source.read_file(name, limit)
        if name in self.texts:
            return self.texts[name]
        if name in self.json:
            return self.json[name].raw
        with self.open_file(name) as file:
            if file.size() > limit:
                raise BadCheckpoint(
                    _("{file}: {size:,} bytes; at most {limit:,} are read.", file=name, size=file.size(), limit=limit)
                )
            return file.read(0, file.size())

    def open_file(self, shard: str) -> ShardFile:
        pieces = self.pieces.get(shard)
        if pieces is None:
            return self.source.open_file(shard) if shard in self.source.shards else super().open_file(shard)
        try:
            return EditedFile(self.source.path(shard), shard, pieces)
        except OSError as error:
            raise BadCheckpoint(_("{file}: {error}.", file=shard, error=error.strerror)) from None


def _by_new_name(edit: Edit, names: dict[str, str]) -> Edit:
    """An edit of a shard that is renamed too, with the new name."""
    if isinstance(edit, DropFile) and edit.file in names:
        raise stale(
            _(
                "{file}: one edit drops it and another renames it to {name}.",
                file=edit.file,
                name=names[edit.file],
            )
        )
    if isinstance(edit, NameFormat):
        return replace(edit, file=names.get(edit.file, edit.file))
    if isinstance(edit, DropTensor):
        return replace(edit, shard=names.get(edit.shard, edit.shard))
    return edit


def _common_prefix(one: str, other: str) -> str:
    return os.path.commonprefix((one, other))  # noqa: RUF071 - of characters: tensor names are no paths


def _edits_in(shard: str, edits: Iterable[Edit]) -> list[Edit]:
    """Those of a tensor's edits that apply to its copy in this shard."""
    return [e for e in edits if getattr(e, "shard", "") in ("", shard)]
