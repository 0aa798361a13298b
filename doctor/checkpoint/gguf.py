"""The GGUF container of llama.cpp: metadata and the list of tensors, read with bounds and without their data.

Little-endian: magic, u32 version, u64 tensors, u64 keys; each key a string, a type and a value; each tensor a string,
its dimensions (in_features first: the reverse of a PyTorch shape), a type and an offset from where the data begins.
Data begins at the next multiple of general.alignment, and every tensor is padded to one.

What llama.cpp refuses becomes a Defect here; reading goes on where the rest can still be made out. Nothing is allocated
for a count before the bytes that it promises are there. A reader of our own, because the ones at hand either take the
file for honest or map it whole.

Sources: ggml-org/llama.cpp docs of gguf in ggml/docs/gguf.md, ggml/src/gguf.cpp (gguf_init_from_reader),
src/llama-model-loader.cpp (shards); llama_split_path for their names.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from doctor.checkpoint.ggml_types import GGML_TYPES, GgmlType
from doctor.checkpoint.safetensors import Defect, ShardFile
from doctor.core.collection import uncollected
from doctor.core.messages import _

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where general.alignment does not say
MAX_DIMS, MAX_NAME = 4, 64  # GGML_MAX_DIMS, GGML_MAX_NAME with its final zero
MAX_HEADER_BYTES = 512 << 20  # the largest vocabularies take about 30 MB
MAX_ELEMENTS = 1 << 22  # of an array: eight times the merges of the largest vocabulary

# Metadata types by number: struct's letter of those of a fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


class GgufTensor(NamedTuple):
    """One tensor. shape: as PyTorch has it, the last axis in_features. type: None where its number is unknown. begin:
    its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType | None
    number: int
    file: str
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def fits(self) -> bool:
        """Whether rows are whole blocks of a type that is known."""
        return self.type is not None and (self.shape[-1] if self.shape else 1) % self.type.block == 0

    @property
    def nbytes(self) -> int:
        """0 where the type or the shape does not allow any data."""
        return self.numel // self.type.block * self.type.nbytes if self.type is not None and self.fits else 0


@dataclass
class GgufFile:
    """One parsed file. tensors: those whose data lies inside it. defects: what llama.cpp refuses it for."""

    name: str
    size: int
    version: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    types: dict[str, tuple[int, int]] = field(default_factory=dict)  # a key -> its type's number, an array's elements'
    tensors: list[GgufTensor] = field(default_factory=list)
    data_begin: int = 0
    defects: list[Defect] = field(default_factory=list)
    missing_bytes: int = 0  # of tensors that end after the file does


class _Broken(Exception):
    """The rest of the header cannot be made out."""

    def __init__(self, detail: str):
        self.detail = detail


class _Reader:
    """Values from the front of a file, in order. Raises _Broken where they end."""

    def __init__(self, file: ShardFile, size: int):
        self._file, self._size = file, min(size, MAX_HEADER_BYTES)
        self.elements = 0  # type of the last array's elements
        self._read, self._bytes, self._at = (
            0,
            b"",
            0,
        )  # bytes of the file read so far; what of them is held; place in it

    @property
    def at(self) -> int:
        """Offset in the file."""
        return self._read - len(self._bytes) + self._at

    @property
    def left(self) -> int:
        """Bytes after it."""
        return self._size - self.at

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._bytes):
            if count > self.left:
                raise _Broken(
                    _(
                        "its header goes on for {count:,} bytes at byte {at:,}, and {left:,} are left",
                        count=count,
                        at=self.at,
                        left=self.left,
                    )
                )
            rest = self._bytes[self._at :]
            more = self._file.read(self._read, max(1 << 20, count - len(rest)))
            self._read += len(more)
            self._bytes, self._at = rest + more, 0
            if count > len(self._bytes):
                raise _Broken(_("it became shorter while it was read"))
        found = self._bytes[self._at : self._at + count]
        self._at += count
        return found

    def number(self, letter: str) -> Any:
        return self.numbers(letter)[0]

    def numbers(self, letters: str) -> tuple:
        """The next numbers, one a letter of `struct`."""
        layout = _layout(letters)
        return layout.unpack(self.take(layout.size))

    def string(self) -> str:
        begin = self._at + 8
        if begin <= len(self._bytes):  # at once where all is here: a vocabulary has 500,000 strings
            end = begin + _LENGTH.unpack_from(self._bytes, self._at)[0]
            if end <= len(self._bytes):
                self._at = end
                return self._bytes[begin:end].decode("utf-8", "replace")
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _Broken(_("metadata of type {number}, which does not exist", number=kind))
        return self.number(_SCALARS[kind])

    def _array(self) -> list:
        kind, count = self.number("I"), self.number("Q")
        self.elements = kind
        if kind != STRING and kind not in _SCALARS:
            raise _Broken(_("an array of metadata type {number}, which does not exist", number=kind))
        least = 8 if kind == STRING else struct.calcsize("<" + _SCALARS[kind])
        if count > MAX_ELEMENTS or count * least > self.left:
            raise _Broken(
                _(
                    "an array states {count:,} elements of {size} bytes or more, and {left:,} bytes are left",
                    count=count,
                    size=least,
                    left=self.left,
                )
            )
        if kind == STRING:
            return [self.string() for _ in range(count)]
        letter = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{letter}", self.take(count * least)))


_LENGTH = struct.Struct("<Q")


@cache
def _layout(letters: str) -> struct.Struct:
    return struct.Struct("<" + letters)


def read_gguf(path: str | os.PathLike, name: str) -> GgufFile:
    """Metadata and tensors of one file. Raises OSError; what is wrong with the content is in `defects`."""
    file = ShardFile(path, name)
    try:
        found = GgufFile(name, file.size())
        reader = _Reader(file, found.size)
        try:
            with uncollected():
                _read_header(reader, found)
        except _Broken as broken:
            found.defects.append(Defect("header", broken.detail))
        return found
    finally:
        file.close()


def _read_header(reader: _Reader, found: GgufFile) -> None:
    magic = reader.take(4)
    if magic != MAGIC:
        raise _Broken(_("begins with the bytes {bytes}; must be those of {magic}", bytes=magic.hex(" "), magic="GGUF"))
    found.version = reader.number("I")
    if found.version not in VERSIONS:
        if found.version & 0xFFFF == 0:
            raise _Broken(_("GGUF version {version}: big-endian, which is not read", version=found.version))
        raise _Broken(_("GGUF version {version}; must be 2 or 3", version=found.version))
    tensors, keys = reader.number("Q"), reader.number("Q")
    for what, count, least in ((_("tensors"), tensors, 24), (_("metadata keys"), keys, 13)):
        if count * least > reader.left:
            raise _Broken(
                _("states {count:,} {what}, and {left:,} bytes are left", count=count, what=what, left=reader.left)
            )
    for _i in range(keys):
        key = reader.string()
        kind = reader.number("I")
        value = reader.value(kind)
        if key in found.metadata:
            found.defects.append(Defect("duplicate-key", _("has the metadata key {key} twice", key=key)))
        found.metadata[key], found.types[key] = value, (kind, reader.elements if kind == ARRAY else 0)
    listed = [_tensor(reader, found) for _i in range(tensors)]
    alignment = found.metadata.get("general.alignment", ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        found.defects.append(
            Defect("alignment", _("general.alignment is {value!r}; must be a power of 2", value=alignment))
        )
        return
    found.data_begin = -(-reader.at // alignment) * alignment
    _place(listed, alignment, found)


def _tensor(reader: _Reader, found: GgufFile) -> GgufTensor:
    """One entry of the list; begin is still its offset in the data."""
    name, axes = reader.string(), reader.number("I")
    if axes > MAX_DIMS:
        raise _Broken(_("tensor {name} has {axes} axes; must be 4 or fewer", name=name[:100], axes=axes))
    *sizes, number, offset = reader.numbers("q" * axes + "iQ")
    if any(size < 0 for size in sizes) or math.prod(sizes) >= 1 << 62:
        raise _Broken(_("tensor {name} has the shape {shape}", name=name[:100], shape=sizes[::-1]))
    if len(name.encode()) >= MAX_NAME:
        found.defects.append(
            Defect("long-name", _("tensor {name} has a name of 64 bytes or more", name=name[:100]), name)
        )
    return GgufTensor(name, tuple(sizes[::-1]), GGML_TYPES.get(number), number, found.name, offset)


def _place(listed: list[GgufTensor], alignment: int, found: GgufFile) -> None:
    """Tensors with their place in the file, and what is wrong with it: data must follow without gap or overlap."""
    expected, seen, broken = 0, set(), False
    for tensor in listed:
        if tensor.name in seen:
            found.defects.append(
                Defect("duplicate-tensor", _("lists tensor {name} twice", name=tensor.name[:100]), tensor.name)
            )
            expected += -(-tensor.nbytes // alignment) * alignment
            continue
        seen.add(tensor.name)
        if tensor.type is None:
            found.defects.append(
                Defect(
                    "unknown-type",
                    _("tensor {name} is of type {number}, which is not known", name=tensor.name, number=tensor.number),
                    tensor.name,
                )
            )
        elif not tensor.fits:
            found.defects.append(
                Defect(
                    "indivisible",
                    _(
                        "tensor {name} {shape} is {type}: in_features {size} is not a multiple of {block}",
                        name=tensor.name,
                        shape=list(tensor.shape),
                        type=tensor.type.name,
                        size=tensor.shape[-1] if tensor.shape else 1,
                        block=tensor.type.block,
                    ),
                    tensor.name,
                )
            )
        if tensor.begin != expected and not broken and all(t.fits for t in listed):
            broken = True  # later offsets follow from this one
            found.defects.append(
                Defect(
                    "offset",
                    _(
                        "tensor {name} begins at {offset:,} of the data; must be {expected:,}",
                        name=tensor.name,
                        offset=tensor.begin,
                        expected=expected,
                    ),
                    tensor.name,
                )
            )
        expected += -(-tensor.nbytes // alignment) * alignment
        begin = found.data_begin + tensor.begin
        if begin + tensor.nbytes > found.size:
            found.missing_bytes = max(found.missing_bytes, begin + tensor.nbytes - found.size)
            found.defects.append(
                Defect(
                    "past-the-end",
                    _(
                        "tensor {name} ends at byte {end:,}, the file at {size:,}",
                        name=tensor.name,
                        end=begin + tensor.nbytes,
                        size=found.size,
                    ),
                    tensor.name,
                )
            )
            continue
        found.tensors.append(tensor._replace(begin=begin))


@dataclass
class GgufModel:
    """One model: a file, or the shards of one. metadata is the first shard's. missing: shards that are not there."""

    name: str
    files: tuple[GgufFile, ...]
    missing: tuple[str, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        return self.files[0].metadata

    @property
    def types(self) -> dict[str, tuple[int, int]]:
        return self.files[0].types

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        return {tensor.name: tensor for file in reversed(self.files) for tensor in reversed(file.tensors)}

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def own(self, key: str, default: Any = None) -> Any:
        """A metadata value under the architecture's name: own("block_count")."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def whole(self) -> bool:
        """Whether every file and every tensor is there and in order."""
        return not self.missing and not any(file.defects for file in self.files)


def group_files(names: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """(name of the model, its files, shards that are missing) of each model among .gguf files, by their names."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted(names):
        match = SHARD.match(name)
        if match is None:
            found[name] = ([name], [])
        else:
            stem, count = match[1], int(match[3])
            found.setdefault(f"{stem}-of-{match[3]}.gguf", ([], []))[0].append(name)
            expected = {f"{stem}-{i:05d}-of-{match[3]}.gguf" for i in range(1, min(count, 10_000) + 1)}
            found[f"{stem}-of-{match[3]}.gguf"][1][:] = sorted(expected - set(names))
    return [(name, files, missing) for name, (files, missing) in found.items()]


def of_one_model(name: str, other: str) -> bool:
    """Whether two .gguf files are shards of one model, by their names."""
    first, second = SHARD.match(name), SHARD.match(other)
    return first is not None and second is not None and (first[1], first[3]) == (second[1], second[3])
