"""A checkpoint read through edits: what a fix would write, without writing it.

Scan, rules, quantizer and writer take an EditedCheckpoint like any other. The listing, the JSON texts, the headers and
the bytes of every shard are those that the writer puts on disk, so a finding on the view points at places in the fixed
files. Bytes that no edit touches come straight from the source; an edited tensor is worked out slab by slab while it is
read.

Edits are checked against the files here: one that expects another value, tensor or shape than there is, is PlanRefused.
"""

import bisect
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from doctor.checkpoint import json_text
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint, Entry, JsonFile
from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo, open_shard
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.edits.derived import STALE, made, opened
from doctor.edits.kinds import (
    CASTS,
    CREATE,
    MADE,
    MISSING,
    TENSOR_EDITS,
    CastTensor,
    CleanJson,
    DropFile,
    DropTensor,
    Edit,
    NameFormat,
    PadTensor,
    Rebase,
    RebuildIndex,
    RemoveJson,
    RenameFile,
    RenameTensor,
    ReplaceText,
    SetJson,
    TakeFile,
    apply,
    edited_info,
    pad_positions,
)
from doctor.edits.substituted import WithFiles, WithNames

IOV_PARTS = 512  # parts of one scattered read; the kernel takes 1,024


@dataclass
class Piece:
    """Bytes [begin, end) of an edited shard: literal `data`, a run of the source at `source`, or one edited tensor."""

    begin: int
    end: int
    data: bytes | None = None
    source: int | None = None
    tensor: "EditedTensor | None" = None


class EditedTensor:
    """One tensor under its edits, readable by leading rows in any order. `made` stands for the stored tensor `old`
    where it is given.
    """

    def __init__(self, old: TensorInfo, new: TensorInfo, edits: list[Edit], made=None):
        self.old, self.new, self.made = old, new, made
        self.shape = new.shape or (1,)
        # Rows grow where slabs are put together, everything else inside a slab.
        self.inner = [e for e in edits if not (isinstance(e, MADE) or (isinstance(e, PadTensor) and e.axis == 0))]
        outer = next((e for e in edits if isinstance(e, PadTensor) and e.axis == 0), None)
        self.positions = None if outer is None else pad_positions(old.shape[0], outer.size, outer.blocks, outer.spread)
        self.old_row_bytes = old.nbytes // (old.shape or (1,))[0] if old.numel else 0
        self.row_bytes = new.nbytes // self.shape[0] if new.numel else 0

    def rows(self, file: ShardFile, begin: int, end: int) -> np.ndarray:
        """Codes of rows [begin, end) after the edits; `file` is open on the source."""
        if self.positions is None:
            return apply(self._read(file, begin, end), self.old, self.inner)
        first, last = map(int, np.searchsorted(self.positions, (begin, end)))
        places = self.positions[first:last] - begin
        out = np.zeros((end - begin, *self.shape[1:]), CODE_NUMPY[self.new.dtype.name])
        if self.inner or self.made is not None:
            out[places] = apply(self._read(file, first, last), self.old, self.inner)
        else:
            self._scatter(file, first, places, out)
        return out

    def _read(self, file: ShardFile, first: int, last: int) -> np.ndarray:
        """Rows before the edits that work on codes in place."""
        if self.made is not None:
            return self.made.rows(first, last)
        codes = np.empty((last - first, *(self.old.shape or (1,))[1:]), CODE_NUMPY[self.old.dtype.name])
        ShardFile.read_into(file, self.old.begin + first * self.old_row_bytes, _bytes(codes))
        return codes

    def _scatter(self, file: ShardFile, first: int, places: np.ndarray, out: np.ndarray) -> None:
        """Read source rows from `first` on straight to their places: rows that stay neighbours are one part of one
        read.
        """
        target, offset, row = _bytes(out), self.old.begin + first * self.old_row_bytes, self.row_bytes
        begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        ends = np.append(begins[1:], len(places))
        parts = [
            target[place * row : (place + n) * row]
            for place, n in zip(places[begins].tolist(), (ends - begins).tolist())
        ]
        for i in range(0, len(parts), IOV_PARTS):
            group = parts[i : i + IOV_PARTS]
            wanted = sum(map(len, group))
            if os.preadv(file.fileno(), group, offset) != wanted:
                at = offset
                for part in group:  # a short read: part by part, which also says where the file ends
                    ShardFile.read_into(file, at, part)
                    at += len(part)
            offset += wanted

    def read_into(self, file: ShardFile, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the tensor's bytes from `offset` on."""
        first, last = offset // self.row_bytes, -(-(offset + len(buffer)) // self.row_bytes)
        raw = _bytes(np.ascontiguousarray(self.rows(file, first, last)))
        skip = offset - first * self.row_bytes
        buffer[:] = raw[skip : skip + len(buffer)]


def _bytes(codes: np.ndarray) -> memoryview:
    """A contiguous array's memory as bytes."""
    return codes.reshape(-1).view(np.uint8).data


class EditedFile(ShardFile):
    """A shard as it will be written. `pieces` lie one behind the other from byte 0."""

    def __init__(self, path, name: str, pieces: list[Piece]):
        super().__init__(path, name)
        self._pieces = pieces
        self._begins = [p.begin for p in pieces]

    def size(self) -> int:
        return self._pieces[-1].end

    def read(self, offset: int, n: int) -> bytes:
        buffer = bytearray(max(min(n, self.size() - offset), 0))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        if end > self.size():
            raise BadCheckpoint(f"{self.name}: has {self.size():,} bytes; byte {end:,} was asked for.")
        at = offset
        while at < end:
            piece = self._pieces[bisect.bisect_right(self._begins, at) - 1]
            stop = min(piece.end, end)
            self._fill(piece, at - piece.begin, buffer[at - offset : stop - offset])
            at = stop

    def _fill(self, piece: Piece, offset: int, buffer: memoryview) -> None:
        if piece.data is not None:
            buffer[:] = piece.data[offset : offset + len(buffer)]
        elif piece.tensor is not None:
            piece.tensor.read_into(self, offset, buffer)
        else:
            super().read_into(piece.source + offset, buffer)


class EditedCheckpoint(Checkpoint):
    """`source` as it will be after `edits`. Nothing is written.

    changed: names of files whose content differs from the source's. taken: those of them that are another checkpoint's,
    byte for byte; `source` holds them already. changed_tensors: names of tensors that edits touch. Raises PlanRefused
    for an edit that does not fit the files.
    """

    def __init__(self, source: Checkpoint, edits: Iterable[Edit] = ()):
        self.edits = tuple(edits)
        other = next((e for e in self.edits if isinstance(e, Rebase)), None)
        source = opened(other.root) if other is not None else source
        files = [e for e in self.edits if isinstance(e, TakeFile)]
        source = WithFiles(source, files) if files else source
        names = [e for e in self.edits if isinstance(e, RenameFile)]
        if names:
            source = WithNames(source, names)
            self.edits = tuple(_called(e, source.names) for e in self.edits)
        super().__init__(source.root, source.only)
        self.source = source
        self.entries = dict(source.entries)
        self.problems = list(source.problems)
        self.shards = dict(source.shards)
        self.json = dict(source.json)
        self.missing_shards = list(source.missing_shards)
        self.taken: set[str] = {self.called(e.file) for e in files}
        self.changed: set[str] = set(self.taken)
        if names and source.json.get(INDEX_NAME) is not source.source.json.get(INDEX_NAME):
            self.changed.add(INDEX_NAME)
            self.taken.discard(INDEX_NAME)
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
            if isinstance(edit, TENSOR_EDITS):
                by_tensor.setdefault(edit.tensor, []).append(edit)
        added: dict[str, list[str]] = {}
        for name, edits in by_tensor.items():
            if name not in self.source.tensors:
                if not any(isinstance(e, CREATE) for e in edits) or not self.source.shards:
                    raise PlanRefused(f"{name}: the checkpoint has no such tensor.", STALE)
                added.setdefault(self._home(name), []).append(name)
        self.changed_tensors = {
            *by_tensor,
            *(t.name for n in self.taken & self.shards.keys() for t in self.shards[n].tensors),
        }
        self._check_names()
        again = {e.file for e in self.edits if isinstance(e, NameFormat)}
        for name in again - self.source.shards.keys():
            raise PlanRefused(f"{name}: not a weight file of this checkpoint.", STALE)
        for shard in list(self.source.shards.values()):
            if (
                shard.name in added
                or shard.name in again
                or any(_concern(by_tensor.get(t.name, ()), shard.name) for t in shard.tensors)
            ):
                self._edit_shard(shard, by_tensor, sorted(added.get(shard.name, [])))

    def _check_names(self) -> None:
        """New names are free, or become free, and are given once."""
        renamed = {e.tensor: e.to for e in self.edits if isinstance(e, RenameTensor)}
        kept = self.source.tensors.keys() - renamed.keys()
        twice = [new for new, count in Counter(renamed.values()).items() if count > 1 or new in kept]
        if twice:
            raise PlanRefused(f"{twice[0]}: two tensors would have this name.", STALE)
        self.changed_tensors |= set(renamed.values())

    def _home(self, name: str) -> str:
        """The shard for a new tensor: that of the tensor whose name agrees longest, so that a block stays together."""
        if not self.source.tensors:
            return max(self.source.shards)
        if not self._names:
            self._names = sorted(self.source.tensors)
        at = bisect.bisect(self._names, name)
        near = max(self._names[max(at - 1, 0) : at + 1], key=lambda other: len(os.path.commonprefix((name, other))))
        return self.source.tensors[near].shard

    def _edit_shard(self, shard: Shard, by_tensor: dict[str, list[Edit]], added: list[str]) -> None:
        if shard.defects:
            raise PlanRefused(
                f"{shard.name}: {shard.defects[0].detail}; a shard is rewritten only when every byte of it is accounted for.",
                "Copy the file again from where it came from, then run `doctor fix`.",
            )
        kept = [(t, _concern(by_tensor.get(t.name, ()), shard.name)) for t in shard.tensors]
        kept = [(t, edits) for t, edits in kept if not any(isinstance(e, DropTensor) for e in edits)]
        kept += [(None, by_tensor[name]) for name in added]
        self.changed.add(shard.name)
        self.taken.discard(shard.name)
        if not kept:
            del self.shards[shard.name], self.entries[shard.name]
            return
        new_shard, pieces = _lay_out(shard, [self._planned(t, edits, shard.name) for t, edits in kept])
        self.shards[shard.name] = new_shard
        self.pieces[shard.name] = pieces
        self.entries[shard.name] = Entry(shard.name, new_shard.size)

    def _planned(self, info: TensorInfo | None, edits: list[Edit], shard: str) -> tuple:
        """(tensor before edits in place, after, edits, what makes it or None)."""
        maker = made(self.source, edits[0].tensor, edits) if edits else None
        if maker is not None:
            info = maker.info._replace(name=edits[0].tensor, shard=shard)
        return info, _edited(info, edits), edits, maker

    # JSON

    def _drop_files(self) -> None:
        for edit in self.edits:
            if isinstance(edit, ReplaceText):
                self._replace_text(edit)
            if isinstance(edit, DropFile):
                if edit.file not in self.entries:
                    raise PlanRefused(f"{edit.file}: not a file of this checkpoint.", STALE)
                del self.entries[edit.file]
                self.json.pop(edit.file, None)
                self.shards.pop(edit.file, None)
                self.changed.add(edit.file)

    def _replace_text(self, edit: ReplaceText) -> None:
        if edit.file not in self.entries or edit.file in self.json or edit.file in self.shards:
            raise PlanRefused(f"{edit.file}: not a text file of this checkpoint.", STALE)
        text = self.source.read_file(edit.file)
        if edit.old.encode() not in text:
            raise PlanRefused(f"{edit.file}: does not hold {shown(edit.old)}.", STALE)
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
        """Text of a JSON file; that of an absent file is an empty object. Raises PlanRefused for a broken one."""
        file = self.json.get(name)
        if file is None:
            if name in self.entries or "/" in name or not name.endswith(".json"):
                raise PlanRefused(f"{name}: not a JSON file of this checkpoint.")
            return "{}\n"
        if file.broken is not None:
            raise PlanRefused(
                f"{name}: {file.broken}; a value can be set only in JSON that can be read.",
                "Repair the file by hand first.",
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
        self.taken.discard(name)
        self.__dict__.pop("weight_map", None)

    # index

    def _follow_index(self) -> None:
        """The shards that an edited index names."""
        wanted = sorted(set(self.weight_map.values()))
        self.missing_shards = [n for n in wanted if n not in self.entries]
        self.shards = {n: self.shards.get(n) or open_shard(self.source.path(n), n) for n in wanted if n in self.entries}

    def _correct_index(self) -> None:
        """Sizes and the names of dropped tensors in an index that is there; its text is otherwise left as it is."""
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
        """An index made of the headers alone: every tensor in the shard the old index named, else in the first that has
        it.
        """
        old_map, old_index = dict(self.weight_map), self.index or {}
        for name in self.entries:
            if name.endswith(".safetensors") and name not in self.shards:
                self.shards[name] = open_shard(self.source.path(name), name)
        self.__dict__.pop("tensors", None)
        names = sorted(self.shards)
        if any(_is_numbered(n) for n in names):  # a whole model beside its own shards is not one of them
            names = [n for n in names if _is_numbered(n)]
        weight_map: dict[str, str] = {}
        for shard in names:
            for info in self.shards[shard].tensors:
                if info.name not in weight_map or old_map.get(info.name) == shard:
                    weight_map[info.name] = shard
        self.shards = {n: self.shards[n] for n in names if n in set(weight_map.values())}
        self.missing_shards = []
        metadata = old_index.get("metadata") if isinstance(old_index.get("metadata"), dict) else {}
        document = {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))}
        self._put_json(INDEX_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        totals = self._totals()
        document["metadata"] |= {k: v for k, v in totals.items() if k == "total_size" or k in metadata}
        self._put_json(INDEX_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    # reading

    def origin(self, name: str) -> str:
        return self.source.origin(name)

    def called(self, name: str) -> str:
        """The name that a file of the source has here."""
        return self.source.names.get(name, name) if isinstance(self.source, WithNames) else name

    def path(self, name: str):
        """Path of a file that no edit changes. Raises BadCheckpoint for one that exists only as edits."""
        if name in self.changed:
            raise BadCheckpoint(f"{name}: changed by edits that are not on disk; read it through the checkpoint.")
        return self.source.path(name) if name in self.entries else super().path(name)

    def read_file(self, name: str, limit: int = 64 << 20) -> bytes:
        if name in self.taken or name not in self.changed:
            return self.source.read_file(name, limit)
        if name in self.texts:
            return self.texts[name]
        if name in self.json:
            return self.json[name].raw
        with self.open_file(name) as file:
            if file.size() > limit:
                raise BadCheckpoint(f"{name}: {file.size():,} bytes; at most {limit:,} are read.")
            return file.read(0, file.size())

    def open_file(self, shard: str) -> ShardFile:
        pieces = self.pieces.get(shard)
        if pieces is None:
            return self.source.open_file(shard) if shard in self.source.shards else super().open_file(shard)
        try:
            return EditedFile(self.source.path(shard), shard, pieces)
        except OSError as error:
            raise BadCheckpoint(f"{shard}: {error.strerror}.") from None


def _called(edit: Edit, names: dict[str, str]) -> Edit:
    """An edit of a shard that is renamed too, by the new name."""
    if isinstance(edit, DropFile) and edit.file in names:
        raise PlanRefused(f"{edit.file}: one edit leaves it out and another renames it to {names[edit.file]}.", STALE)
    if isinstance(edit, NameFormat):
        return replace(edit, file=names.get(edit.file, edit.file))
    if isinstance(edit, DropTensor):
        return replace(edit, shard=names.get(edit.shard, edit.shard))
    return edit


def _is_numbered(name: str) -> bool:
    head, _, count = name.removesuffix(".safetensors").rpartition("-of-")
    return count.isdigit() and head[-1:].isdigit()


def _concern(edits: Iterable[Edit], shard: str) -> list[Edit]:
    """Those of a tensor's edits that are about its copy in this shard."""
    return [e for e in edits if getattr(e, "shard", "") in ("", shard)]


def _edited(info: TensorInfo, edits: list[Edit]) -> TensorInfo:
    if not edits:
        return info
    if info.dtype.name not in CODE_NUMPY and not all(isinstance(e, RenameTensor) for e in edits):
        raise PlanRefused(f"{info.name}: dtype {info.dtype.name} has no whole-byte elements and cannot be edited.")
    for edit in edits:
        if isinstance(edit, CastTensor) and not {info.dtype.name, edit.dtype} <= {*CASTS}:
            raise PlanRefused(
                f"{info.name}: {info.dtype.name} is not cast to {edit.dtype} here; {', '.join(CASTS)} are.", STALE
            )
        if isinstance(edit, PadTensor):
            old = info.shape[edit.axis] if 0 <= edit.axis < len(info.shape) else None
            if old is None or edit.size < old or old % edit.blocks or edit.size % edit.blocks:
                raise PlanRefused(
                    f"{info.name}: axis {edit.axis} of {list(info.shape)} cannot grow to {edit.size} in {edit.blocks} equal "
                    "parts.",
                    STALE,
                )
    return edited_info(info, edits)


def _lay_out(shard: Shard, parts: list[tuple]) -> tuple[Shard, list[Piece]]:
    """The shard's new header and where each byte of the new file comes from; tensors keep their order."""
    entries, at = {}, 0
    # transformers 4 refuses a file whose metadata does not name a format.
    entries["__metadata__"] = {"format": "pt", **(shard.metadata or {})}
    for _, new, _, _ in parts:
        entries[new.name] = {"dtype": new.dtype.name, "shape": list(new.shape), "data_offsets": [at, at + new.nbytes]}
        at += new.nbytes
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    result = Shard(shard.name, 8 + len(raw) + at, len(raw), metadata=entries["__metadata__"])
    pieces = [Piece(0, result.data_begin, data=struct.pack("<Q", len(raw)) + raw)]
    at = result.data_begin
    for old, new, edits, maker in parts:
        info = new._replace(begin=at, end=at + new.nbytes)
        result.tensors.append(info)
        if info.nbytes:
            _join(pieces, old, info, edits, maker)
        at = info.end
    return result, pieces


def _join(pieces: list[Piece], old: TensorInfo, info: TensorInfo, edits: list[Edit], maker) -> None:
    """Put one more tensor behind the pieces; neighbours that no edit touches become one run."""
    last = pieces[-1]
    if any(not isinstance(e, RenameTensor) for e in edits):
        pieces.append(Piece(info.begin, info.end, tensor=EditedTensor(old, info, edits, maker)))
    elif last.source is not None and last.source + last.end - last.begin == old.begin:
        last.end = info.end
    else:
        pieces.append(Piece(info.begin, info.end, source=old.begin))


def edited_text(text: str, edit: SetJson | RemoveJson) -> str:
    """The text after one edit. Raises PlanRefused where the value now there is not the one the edit expects."""
    now = _value_at(json.loads(text.removeprefix("\ufeff")), edit.pointer)
    where = f"{edit.file}#{edit.pointer}"
    anything = isinstance(edit, RemoveJson) and edit.expect is None
    if not (now is not MISSING if anything else same_json(now, edit.expect)):
        raise PlanRefused(
            f"{where}: {shown(now)}; the edit expects {'a value' if anything else shown(edit.expect)}.", STALE
        )
    try:
        if isinstance(edit, SetJson):
            return json_text.set_value(text, edit.pointer, edit.value)
        return json_text.remove_value(text, edit.pointer)
    except KeyError as error:
        raise PlanRefused(
            f"{where}: {error.args[0] or 'the document'} is no object that could hold the key.", STALE
        ) from None


def _value_at(value: object, pointer: str) -> object:
    for key in json_text.split_pointer(pointer):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def same_json(a: object, b: object) -> bool:
    """Equal as JSON: 1 is not 1.0 and not true, NaN is NaN."""
    if a is MISSING or b is MISSING:
        return a is b
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def shown(value: object) -> str:
    """A JSON value as a message shows it."""
    text = "no value" if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
