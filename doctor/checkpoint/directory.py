"""A checkpoint directory (or one .safetensors or .gguf file) on disk: opened and listed, never judged, never changed.

Faults of the files become data here (`problems`, `Shard.defects`, `JsonFile.error`), because a rule reports them with a
place and a fix. Only if nothing can be read an exception is raised.

No path leaves the directory: names from an index are file names, never paths; a symbolic link is followed only inside
the directory or into the blob store of a Hub cache, which is how huggingface_hub lays out its snapshots.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from doctor.checkpoint import json_text
from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.gguf import GgufModel, group_files, of_one_model, read_gguf
from doctor.checkpoint.regular import open_regular, require_same_link
from doctor.checkpoint.safetensors import Defect, Shard, ShardFile, TensorInfo, open_shard
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _

INDEX_NAME = "model.safetensors.index.json"
FORGOTTEN_BYTES = 1 << 20  # larger documents are not kept parsed during a long run
MAX_JSON_BYTES = 64 << 20  # the largest tokenizer.json in use is about 33 MB
MAX_SPAN_BYTES = 1 << 20  # above, places inside the text are not worked out: findings point at line 1


@dataclass(frozen=True)
class Entry:
    """One file of the listing. `target` is set for a symbolic link."""

    name: str
    size: int
    target: str | None = None


class JsonFile:
    """One JSON document of a checkpoint: its text, and its value or the error. Parsed when it is first asked for."""

    def __init__(self, name: str, raw: bytes):
        self.name = name
        self.raw = raw
        self.error: json_text.JsonError | None = None
        self.duplicates: list[str] = []  # keys that stand twice in one object; readers keep the last
        self.non_standard: list[str] = []  # NaN, Infinity, -Infinity: Python reads them, other readers do not
        self.bom = raw.startswith(b"\xef\xbb\xbf")

    @cached_property
    def value(self) -> object:
        """The parsed document, None where it is broken; `error`, `duplicates` and `non_standard` are set with it."""

        def pairs(items):
            seen = dict(items)
            if len(seen) != len(items):
                self.duplicates += sorted(k for k, n in Counter(k for k, _ in items).items() if n > 1)
            return seen

        def constant(word):
            self.non_standard.append(word)
            return float(word)

        self.duplicates, self.non_standard = [], []
        try:
            text = self.raw.decode("utf-8-sig")
            return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
        except UnicodeDecodeError as error:
            before = self.raw[: error.start].decode("utf-8", "replace")
            self.error = json_text.JsonError(
                _("not UTF-8: byte 0x{byte:02x} at offset {offset}", byte=self.raw[error.start], offset=error.start),
                before,
                len(before),
            )
        except json.JSONDecodeError as error:
            self.error = json_text.JsonError(error.msg, error.doc, error.pos)
        except (RecursionError, ValueError) as error:
            self.error = json_text.JsonError(_("not readable: {error}", error=str(error)[:100]), "", 0)
        return None

    @property
    def broken(self) -> json_text.JsonError | None:
        """Why there is no value, None where there is one."""
        return self.error if self.value is None else None

    @cached_property
    def doc(self) -> json_text.JsonText | None:
        """What is odd about the text; None if the file is broken, very large or nested too deeply."""
        if self.broken is not None or len(self.raw) > MAX_SPAN_BYTES:
            return None
        try:
            return json_text.parse_bytes(self.raw)
        except json_text.JsonError:
            return None

    def place(self, path: str) -> tuple[int, int, int] | None:
        """(line, column, length) of the value at a JSON pointer, 1-based; None if it is not in the text."""
        places = self._places
        if places is None:
            return None
        try:
            span = places.find(path)
        except json_text.JsonError:
            return None
        return None if span is None else (*json_text.line_column(places.text, span.begin), span.end - span.begin)

    @cached_property
    def _places(self) -> json_text.JsonPlaces | None:
        """Where values are; None if the file is broken or very large."""
        if self.broken is not None or len(self.raw) > MAX_SPAN_BYTES:
            return None
        return json_text.JsonPlaces(self.raw.decode("utf-8"))

    def frame(self, line: int) -> tuple[tuple[int, str], ...]:
        """(number, text) of a line, 1-based, and of the one before it."""
        text = self.raw.decode("utf-8", "replace")
        end = start = -1
        for _n in range(line):
            start, end = end + 1, text.find("\n", end + 1)
        lines = [(line, text[start : end if end >= 0 else None])]
        if line > 1:
            lines.insert(0, (line - 1, text[text.rfind("\n", 0, start - 1) + 1 : start - 1]))
        return tuple((n, words.rstrip("\r").replace("\t", " ")) for n, words in lines)


class Checkpoint:
    """The files of one checkpoint. Use `Checkpoint.open`.

    `tensors` maps names to the TensorInfo that a reader takes: in the shard that the index names, else in the first
    that has it. `problems` are Defects of the listing itself (links that lead out, unreadable files). `gguf` are the
    models in .gguf files, where no safetensors file is. `unread`, `no_files`: why tensor bytes cannot be read, and why
    there are no files to judge; "" where they can, and where there are.
    """

    unread: str = ""
    no_files: str = ""
    gguf: Sequence[GgufModel] = ()

    def __init__(self, root: Path, only: str | None = None):
        self.root = root
        self.only = only
        self.entries: dict[str, Entry] = {}
        self.problems: list[Defect] = []
        self.shards: dict[str, Shard] = {}
        self.json: dict[str, JsonFile] = {}
        self.missing_shards: list[str] = []

    @classmethod
    def open(cls, path: str | os.PathLike) -> Checkpoint:
        """Open a directory, or one .safetensors or .gguf file. Raises BadCheckpoint where nothing can be looked at."""
        root = Path(path)
        try:
            mode = root.stat().st_mode
        except OSError as error:
            raise BadCheckpoint(
                _("{path}: {error}.", path=path, error=error.strerror),
                _("Give a directory that holds config.json and *.safetensors."),
            ) from None
        only = None
        if stat.S_ISREG(mode):
            if root.suffix not in (".safetensors", ".gguf"):
                raise BadCheckpoint(
                    _("{path}: not a directory and not a .safetensors or .gguf file.", path=path),
                    _("Give the checkpoint's directory."),
                )
            root, only = root.parent, root.name
        elif not stat.S_ISDIR(mode):
            raise BadCheckpoint(
                _("{path}: neither a directory nor a regular file.", path=path), _("Give the checkpoint's directory.")
            )
        self = cls(root, only)
        self._list()
        self._load_json()
        self._open_shards()
        self._open_gguf()
        return self

    @property
    def name(self) -> str:
        return self.only or self.root.resolve().name

    # listing

    def _list(self) -> None:
        try:
            found = sorted(os.scandir(self.root), key=lambda e: e.name)
        except OSError as error:
            raise BadCheckpoint(
                _("{path}: {error}.", path=self.root, error=error.strerror),
                _("Check the permissions of the directory."),
            ) from None
        for item in found:
            if self.only and item.name != self.only and not of_one_model(item.name, self.only):
                continue
            try:
                target = self._target(item)
                info = item.stat()
            except OSError as error:
                self.problems.append(Defect("unreadable", error.strerror or str(error), item.name))
                continue
            if target is not None and not self.may_follow(target):
                self.problems.append(
                    Defect("link-leads-out", _("a symbolic link to {target}", target=os.readlink(item.path)), item.name)
                )
            elif stat.S_ISREG(info.st_mode):
                self.entries[item.name] = Entry(item.name, info.st_size, target)
            elif not stat.S_ISDIR(info.st_mode):
                self.problems.append(Defect("special-file", _("neither a file nor a directory"), item.name))

    @staticmethod
    def _target(item: os.DirEntry) -> str | None:
        return os.path.realpath(item.path) if item.is_symlink() else None

    def may_follow(self, target: str) -> bool:
        """Whether a link's resolved target is inside the directory, or in the Hub cache that the directory belongs
        to.
        """
        root = os.path.realpath(self.root)
        # A Hub cache keeps models--org--name/snapshots/REV/FILE -> ../../blobs/HASH.
        blobs = os.path.join(os.path.dirname(os.path.dirname(root)), "blobs")
        in_hub_cache = os.path.basename(os.path.dirname(root)) == "snapshots"
        return target.startswith(root + os.sep) or (in_hub_cache and target.startswith(blobs + os.sep))

    def origin(self, name: str) -> str:
        """The name of a listed file on disk, which differs if an edit renamed it."""
        return name

    def path(self, name: str) -> Path:
        """Path of a listed file. Raises BadCheckpoint for a name that is not listed or has become another link."""
        if name not in self.entries:
            raise BadCheckpoint(_("{file}: not a file of {checkpoint}.", file=name, checkpoint=self.root))
        return require_same_link(self.root / name, self.entries[name].target)

    def read_file(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Bytes of one listed file. Raises BadCheckpoint when it is larger than `limit` or cannot be read."""
        if self.entries[name].size > limit:
            raise BadCheckpoint(
                _(
                    "{file}: {size:,} bytes; at most {limit:,} are read.",
                    file=name,
                    size=self.entries[name].size,
                    limit=limit,
                )
            )
        try:
            with open(open_regular(self.path(name)), "rb") as file:
                return file.read(self.entries[name].size)  # read(limit) would reserve the limit at once
        except OSError as error:
            raise BadCheckpoint(_("{path}: {error}.", path=name, error=error.strerror)) from None

    def sha256(self, name: str) -> str:
        """SHA-256 of a listed file, in hexadecimal: reads all of it. Raises BadCheckpoint."""
        import hashlib

        try:
            with open(open_regular(self.path(name)), "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadCheckpoint(_("{path}: {error}.", path=name, error=error.strerror)) from None

    # contents

    def _load_json(self) -> None:
        for name in self.entries:
            if not name.endswith(".json"):
                continue
            try:
                raw = self.read_file(name)
            except BadCheckpoint as error:
                self.problems.append(Defect("unreadable", error.message, name))
                continue
            self.json[name] = JsonFile(name, raw)

    def forget_parsed(self) -> None:
        """Free large parsed documents: a tokenizer of 256,000 tokens takes 28 MB as text and 200 MB as objects."""
        for file in self.json.values():
            if len(file.raw) > FORGOTTEN_BYTES:
                vars(file).pop("value", None)  # parsed again when it is asked for again

    def value(self, name: str) -> dict | None:
        """The object in a JSON file, or None where the file is absent, broken or holds no object."""
        file = self.json.get(name)
        return file.value if file is not None and isinstance(file.value, dict) else None

    @property
    def index(self) -> dict | None:
        return self.value(INDEX_NAME)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """tensor -> file of the index, only entries of the right form; {} without an index."""
        mapping = (self.index or {}).get("weight_map")
        if not isinstance(mapping, dict):
            return {}
        return {k: v for k, v in mapping.items() if isinstance(v, str)}

    def _open_shards(self) -> None:
        listed = [n for n in self.entries if n.endswith(".safetensors")]
        wanted = sorted(set(self.weight_map.values()))
        for name in wanted:
            if name not in self.entries:
                self.missing_shards.append(name)
        # An index decides which files belong to the checkpoint. Of one that names no file here, numbered shards are
        # looked at: it may be of another save.
        names = [n for n in wanted if n in self.entries]
        if not names:
            names = [n for n in listed if is_numbered(n)] if wanted else listed
        self.shards = dict(zip(names, self._open_all(names), strict=True))

    def _open_all(self, names: list[str]) -> list[Shard]:
        return [self._open_shard(name) for name in names]

    def _open_shard(self, name: str) -> Shard:
        return open_shard(self.path(name), name)

    def _open_gguf(self) -> None:
        """The models in .gguf files. Beside safetensors they are copies of the model that nobody asked about."""
        found: list[GgufModel] = []
        for name, files, missing in group_files([n for n in self.entries if n.endswith(".gguf") and not self.shards]):
            read = []
            for file in files:
                try:
                    read.append(read_gguf(self.path(file), file))
                except OSError as error:
                    self.problems.append(Defect("unreadable", error.strerror or str(error), file))
            if read:
                found.append(GgufModel(name, tuple(read), tuple(missing)))
        self.gguf = tuple(found)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for shard in self.shards.values():
            for info in shard.tensors:
                if info.name not in found or self.weight_map.get(info.name) == shard.name:
                    found[info.name] = info
        return found

    @cached_property
    def total_bytes(self) -> int:
        listed = sum(t.nbytes for s in self.shards.values() for t in s.tensors)
        return listed + sum(t.nbytes for model in self.gguf for t in model.tensors.values())

    def open_file(self, shard: str) -> ShardFile:
        """The shard, open for reading. Raises BadCheckpoint."""
        try:
            return ShardFile(self.path(shard), shard)
        except OSError as error:
            raise BadCheckpoint(_("{path}: {error}.", path=shard, error=error.strerror)) from None

    def chunks(self, file: ShardFile, info: TensorInfo, step: int) -> Iterator[memoryview]:
        """The tensor's bytes in order, at most `step` each; a chunk is valid until the next one is asked for."""
        for _first, part in file.blocks(info.begin, info.end, step):
            yield part

    def load(self, name: str) -> np.ndarray:
        """Raw codes of one tensor in its shape; see dtypes.CODE_NUMPY for the NumPy type of each dtype."""
        info = self.tensors[name]
        with self.open_file(info.shard) as file:
            raw = bytearray(info.nbytes)
            file.read_into(info.begin, memoryview(raw))
        return codes(raw, info)

    def rows(self, name: str, max_bytes: int = 64 << 20) -> Iterator[np.ndarray]:
        """The tensor's codes in slabs of whole leading rows, at most max_bytes each (one row at least)."""
        info = self.tensors[name]
        row_bytes = max(info.nbytes // max(info.shape[0] if info.shape else 1, 1), 1)
        step = max(max_bytes // row_bytes, 1) * row_bytes
        with self.open_file(info.shard) as file:
            for _, part in file.blocks(info.begin, info.end, step):
                yield np.frombuffer(part, CODE_NUMPY[info.dtype.name]).reshape(-1, *info.shape[1:])


def codes(raw: bytes | bytearray | memoryview, info: TensorInfo) -> np.ndarray:
    """View of raw bytes as the tensor's codes. Raises BadCheckpoint for types without a whole-byte code (F4, F6)."""
    kind = CODE_NUMPY.get(info.dtype.name)
    if kind is None:
        raise BadCheckpoint(
            _(
                "{tensor}: dtype {dtype} has no whole-byte elements and cannot be read as an array.",
                tensor=info.name,
                dtype=info.dtype.name,
            )
        )
    return np.frombuffer(raw, kind).reshape(info.shape)


def is_numbered(name: str) -> bool:
    """Whether a file name is that of a shard among several: `model-00001-of-00003.safetensors`."""
    head, _of, count = name.removesuffix(".safetensors").rpartition("-of-")
    return count.isdigit() and head[-1:].isdigit()
