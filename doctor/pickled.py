"""Weight files of torch.save, read as data: where each tensor's bytes lie in the file, without unpickling it.

Such a file is a zip of plain, uncompressed storages and one small pickle that says which tensor is which part of which storage.
Unpickling is what is dangerous: a pickle may call anything. Here nothing is imported and nothing is called. The standard library's
disassembler (pickletools.genops) gives the operations, and a dozen of them are followed, with the three names that torch writes for
tensors standing for what they mean; any other name, operation or shape of things is refused by what it is. What is left are offsets,
which are read like those of a safetensors header, with distrust: each part must lie inside its storage, each storage inside the file.

Sources: pytorch/pytorch torch/serialization.py (_save), torch/_utils.py (_rebuild_tensor_v2, _rebuild_parameter); Python Lib/pickletools.py.
"""

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from doctor.checkpoint import Checkpoint, Entry
from doctor.dtypes import DTYPES
from doctor.edits import ReadPickle
from doctor.errors import PlanRefused
from doctor.shard import MAX_DIMS, Shard, ShardFile, TensorInfo

MAX_PICKLE_BYTES = 64 << 20  # a model of 100,000 tensors takes 15 MB
STORAGES = {"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64", "IntStorage": "I32",
            "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"}
_PUSHES = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "LONG1", "INT", "BINFLOAT"}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class NotPlain(Exception):
    """Why this file is not read; the text goes on after a colon."""


class _Name(str):
    """A global's name, which stands for itself: it is never looked up."""


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def read_pickle(path: str | os.PathLike, name: str) -> list[TensorInfo]:
    """The tensors of one file in the order of their bytes; begin and end are offsets in it. Raises NotPlain, OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        members = _members(file)
        stems = [n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")]
        if len(stems) != 1:
            raise NotPlain("it holds no data.pkl as torch.save writes it")
        order = f"{stems[0]}byteorder"
        if order in members and _read(file, members, order, size, 16).strip() != b"little":
            raise NotPlain("its numbers are not little-endian")
        tensors = _tensors(_read(file, members, f"{stems[0]}data.pkl", size, MAX_PICKLE_BYTES))
        places = {key: _place(file, members, f"{stems[0]}data/{key}", size) for key in {t.storage.key for t in tensors.values()}}
    return sorted((_info(n, t, *places[t.storage.key], name) for n, t in tensors.items()), key=lambda info: (info.begin, info.name))


def _members(file) -> dict[str, zipfile.ZipInfo]:
    """The zip's list, which is all that the zip module is asked for: torch.save packs nothing."""
    try:
        return {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
        raise NotPlain(f"it is no zip file of torch.save ({error})") from None


def _place(file, members: dict[str, zipfile.ZipInfo], name: str, size: int) -> tuple[int, int]:
    """(offset, bytes) of one member's content in the file of `size` bytes."""
    member = members.get(name)
    if member is None or member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
        raise NotPlain(f"its {name} is not there, or is packed")
    begin, head = member.header_offset + 30, b""
    if 30 <= begin <= size:
        file.seek(member.header_offset)
        head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise NotPlain(f"its {name} is not where the zip's list says")
    begin += sum(struct.unpack("<HH", head[26:30]))
    if begin + member.file_size > size:
        raise NotPlain(f"its {name} ends after the file")
    return begin, member.file_size


def _read(file, members: dict[str, zipfile.ZipInfo], name: str, size: int, most: int) -> bytes:
    begin, count = _place(file, members, name, size)
    if count > most:
        raise NotPlain(f"its {name} has {count:,} bytes; at most {most:,} are read")
    file.seek(begin)
    return file.read(count)


def _info(name: str, tensor: _Tensor, begin: int, size: int, file: str) -> TensorInfo:
    kind = DTYPES[tensor.storage.dtype]
    width, count = kind.bits // 8, math.prod(tensor.shape)
    if size != tensor.storage.numel * width or tensor.offset + count > tensor.storage.numel:
        raise NotPlain(f"{name} is not inside its storage {tensor.storage.key}")
    begin += tensor.offset * width
    return TensorInfo(name, kind, tensor.shape, file, begin, begin + count * width)


def _tensors(pickle: bytes) -> dict[str, _Tensor]:
    found = _follow(pickle)
    if not isinstance(found, dict) or not found:
        raise NotPlain("it holds no dictionary of tensors")
    for name, value in found.items():
        if not isinstance(value, _Tensor):
            raise NotPlain(f"its entry {name[:60]!r} is no tensor")
    return found


def _follow(pickle: bytes):
    """What the pickle describes, out of dictionaries, tuples, strings, numbers, names, storages and tensors."""
    stack, memo = [], {}
    try:
        for operation, argument, _ in pickletools.genops(pickle):
            word = operation.name
            if word in _PUSHES:
                stack.append(argument)
            elif word in _CONSTANTS:
                stack.append(_CONSTANTS[word])
            elif word == "GLOBAL":
                stack.append(_Name(argument))
            elif word == "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(f"{module} {name}"))
            elif word in ("EMPTY_DICT", "EMPTY_TUPLE", "MARK"):
                stack.append({"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "MARK": _Mark}[word]())
            elif word == "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            elif word in _TUPLES:
                stack[-_TUPLES[word]:] = [tuple(stack[-_TUPLES[word]:])]
            elif word in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if word == "MEMOIZE" else argument] = stack[-1]
            elif word in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif word == "BINPERSID":
                stack.append(_storage(stack.pop()))
            elif word == "REDUCE":
                arguments = stack.pop()
                stack.append(_meant(stack.pop(), arguments))
            elif word == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], key, value)
            elif word == "SETITEMS":
                items = _since_mark(stack)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _put(stack[-1], key, value)
            elif word == "BUILD" and isinstance(stack[-2], dict):
                stack.pop()  # attributes of an OrderedDict (_metadata: versions of modules)
            elif word == "STOP":
                return stack.pop()
            elif word not in ("PROTO", "FRAME"):
                raise NotPlain(f"its pickle has the operation {word}")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, UnicodeDecodeError) as error:
        raise NotPlain(f"its pickle cannot be followed ({type(error).__name__})") from None
    raise NotPlain("its pickle has no end")


def _put(into: dict, key, value) -> None:
    if not isinstance(into, dict) or not isinstance(key, str):  # hashing a tuple of tuples of the same tuples has no end
        raise NotPlain(f"it holds a key that is a {type(key).__name__}")
    into[key] = value


def _said(name) -> str:
    return name[:80].replace(" ", ".") if isinstance(name, str) else f"a {type(name).__name__}"


def _since_mark(stack: list) -> list:
    at = max(i for i, value in enumerate(stack) if isinstance(value, _Mark))
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _storage(value) -> _Storage:
    kind, name, key, _, numel = value
    dtype = STORAGES.get(name.removeprefix("torch ")) if isinstance(name, _Name) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
        raise NotPlain(f"it holds a storage of the kind {_said(name)}")
    return _Storage(dtype, key, numel)


def _meant(name, arguments):
    """What one of the three names that torch writes stands for, given its arguments."""
    if name == "collections OrderedDict" and arguments == ():
        return {}
    if name == "torch._utils _rebuild_parameter" and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name == "torch._utils _rebuild_tensor_v2":
        storage, offset, shape, strides = arguments[:4]
        sizes = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in sizes) or len(shape) != len(strides) or len(shape) > MAX_DIMS:
            raise NotPlain("it holds a tensor whose sizes are no numbers")
        step = 1
        for size, stride in zip(reversed(shape), reversed(strides)):
            if size != 1 and stride != step and 0 not in shape:
                raise NotPlain(f"it holds a view of strides {list(strides)} for the shape {list(shape)}, which is not in the order of its bytes")
            step *= size
        return _Tensor(storage, offset, tuple(shape))
    raise NotPlain(f"it calls {_said(name)}, which is no tensor")


class WithPickles(Checkpoint):
    """`source` with files of torch.save in the place of safetensors files: what the edits ReadPickle make, before any other edit sees it."""

    def __init__(self, source: Checkpoint, edits: Iterable[ReadPickle]):
        super().__init__(source.root, source.only)
        self.source, self.names = source, {e.to: e.file for e in edits}
        self.entries = {n: e for n, e in source.entries.items() if n not in self.names.values()}
        self.problems, self.json, self.shards = list(source.problems), dict(source.json), dict(source.shards)
        for to, file in sorted(self.names.items()):
            if file not in source.entries or to in source.entries or not to.endswith(".safetensors") or os.path.basename(to) != to:
                raise PlanRefused(f"{file}: is not there, or {to} is no free name.", "The edits were made for another state of the files: run `doctor fix` again.")
            size = source.entries[file].size
            self.entries[to] = Entry(to, size)
            try:
                self.shards[to] = Shard(to, size, tensors=[info._replace(shard=to) for info in read_pickle(source.path(file), file)])
            except NotPlain as error:
                raise PlanRefused(f"{file}: {error}.") from None
            except OSError as error:
                raise PlanRefused(f"{file}: {error.strerror}.") from None
        self.missing_shards = [n for n in source.missing_shards if n not in self.names]

    def origin(self, name: str) -> str:
        return self.source.origin(self.names.get(name, name))

    def path(self, name: str) -> Path:
        return self.source.path(self.names[name]) if name in self.names else super().path(name)

    def read_file(self, name: str, limit: int = 64 << 20) -> bytes:
        return self.source.read_file(self.names.get(name, name), limit)

    def open_file(self, shard: str) -> ShardFile:
        return ShardFile(self.path(shard), shard) if shard in self.names else self.source.open_file(shard)
