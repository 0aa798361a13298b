"""One safetensors file: its header, read with distrust, and its bytes, read once.

The format's own reader stops at the first fault and names one tensor at most. Here a fault becomes a `Defect` (data
that rules turn into findings) and reading goes on with whatever can still be trusted, so that one damaged entry does
not hide the other four hundred. Nothing is mapped: a truncated or failing file raises OSError instead of SIGBUS.

Rules of the format: safetensors `safetensors/src/tensor.rs` (0.8).
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from doctor.checkpoint.dtypes import DTYPES, Dtype
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.messages import _

MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a longer header is refused by every reader
CHUNK_BYTES = 1 << 20  # 1 MiB: larger reads were no faster and cost memory per worker
MAX_DIMS = 64  # no tensor has more; a header that says so is hostile or damaged
MAX_NUMEL = 1 << 62  # above, byte offsets no longer fit signed 64 bits


def new_digest():
    """A hash object for the bytes of one tensor: blake2b, 16 bytes."""
    import hashlib  # it costs milliseconds, and a look at headers alone hashes nothing

    return hashlib.blake2b(digest_size=16)


class TensorInfo(NamedTuple):  # not a dataclass: 50,000 of them are made four times as fast
    """One tensor's entry in a header. `begin` and `end` are offsets in the shard file, header included."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Defect:
    """What is wrong with one file: `kind` is a word that rules select by, `detail` one phrase with the numbers."""

    kind: str
    detail: str
    tensor: str | None = None
    offset: int | None = None


@dataclass
class Shard:
    """One parsed file. `tensors` holds the entries whose bytes can be read, in file order."""

    name: str
    size: int
    header_bytes: int = 0
    tensors: list[TensorInfo] = field(default_factory=list)
    metadata: dict[str, str] | None = None
    defects: list[Defect] = field(default_factory=list)

    @property
    def data_begin(self) -> int:
        return 8 + self.header_bytes


def parse_header(name: str, size: int, read) -> Shard:
    """Read and judge the header of a shard of `size` bytes. `read(offset, n) -> bytes` may return fewer at the end."""
    shard = Shard(name, size)
    head = read(0, min(8, size))
    if size < 8:
        shard.defects.append(Defect("too-small", f"{size} bytes; the header length alone takes 8"))
        return shard
    (length,) = struct.unpack("<Q", head)
    if _is_not_safetensors(shard, read):
        return shard
    if length > MAX_HEADER_BYTES:
        shard.defects.append(
            Defect("header-length", f"header length {length:,} is over the format's {MAX_HEADER_BYTES:,}")
        )
        return shard
    if length + 8 > size:
        shard.defects.append(Defect("truncated", f"header needs {length + 8:,} bytes, the file has {size:,}"))
        return shard
    shard.header_bytes = length
    _parse_json(shard, read(8, length))
    return shard


def _is_not_safetensors(shard: Shard, read) -> bool:
    """Files that people find under this name and that are something else: say which.

    A header length that a header can have is believed: as bytes, 640 is the beginning of a pickle.
    """
    start = read(0, min(512, shard.size))
    length = int.from_bytes(start[:8], "little")
    if 0 < length <= MAX_HEADER_BYTES and (start[8:9] == b"{" or length + 8 <= shard.size):
        return False
    looks = {
        b"version https://git-lfs": ("lfs-pointer", "a git-lfs pointer, not the file it points to"),
        b"<!DOCTYPE": ("web-page", "an HTML page, not a shard"),
        b"<html": ("web-page", "an HTML page, not a shard"),
        b"PK\x03\x04": ("pickle", "a zip archive (a torch pickle?), not a shard"),
        b"\x80\x02": ("pickle", "a Python pickle, not a shard"),
        b"GGUF": ("gguf", "a GGUF file, not a shard"),
    }
    for magic, (kind, detail) in looks.items():
        if start.lower().startswith(magic.lower()):
            shard.defects.append(Defect(kind, detail))
            return True
    if start == bytes(len(start)):
        shard.defects.append(
            Defect("zero-filled", f"the first {len(start)} bytes are zero: a preallocated file that was never filled")
        )
        return True
    return False


def _parse_json(shard: Shard, raw: bytes) -> None:
    duplicates: list[str] = []

    def pairs(items):
        seen = dict(items)
        if len(seen) < len(items):
            met = set()
            duplicates.extend(key for key, _ in items if key in met or met.add(key))
        return seen

    try:
        header = json.loads(raw.decode("utf-8").rstrip(" \n\r\t"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        shard.defects.append(Defect("header-json", f"header is not UTF-8 at byte {8 + error.start}"))
        return
    except (ValueError, RecursionError) as error:
        shard.defects.append(Defect("header-json", f"header is not JSON: {str(error)[:120]}"))
        return
    if not isinstance(header, dict):
        shard.defects.append(Defect("header-json", f"header is a JSON {type(header).__name__}; it must be an object"))
        return
    for key in duplicates:
        shard.defects.append(
            Defect("duplicate-name", "the name stands twice in the header; readers keep the last", key)
        )
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        shard.defects.append(Defect("metadata", "__metadata__ must map strings to strings"))
        metadata = None
    shard.metadata = metadata
    for name, entry in header.items():
        info = _entry(shard, name, entry)
        if info is not None:
            shard.tensors.append(info)
    shard.tensors.sort(key=lambda t: (t.begin, t.end, t.name))
    _check_coverage(shard)


_KEYS = {"dtype", "shape", "data_offsets"}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMEL  # True and False are ints too, but of another type


def _entry(shard: Shard, name: str, entry: object) -> TensorInfo | None:
    """The tensor of one header entry, or None and a defect of the shard."""
    try:  # what is sound needs no reason; a large mixture of experts has 50,000 entries
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if (
            type(shape) is list
            and len(shape) <= MAX_DIMS
            and all(map(_is_count, shape))
            and type(entry["data_offsets"]) is list
            and _is_count(first)
            and _is_count(last)
        ):
            numel = math.prod(shape)
            end = shard.data_begin + last
            if numel <= MAX_NUMEL and dtype.nbytes(numel) == last - first and end <= shard.size:
                return TensorInfo(name, dtype, tuple(shape), shard.name, shard.data_begin + first, end)
    except (KeyError, TypeError, ValueError):
        pass
    return _faulty(shard, name, entry)


def _faulty(shard: Shard, name: str, entry: object) -> None:
    """Say what is wrong with an entry that is not sound."""

    def bad(kind: str, detail: str, offset: int | None = None) -> None:
        shard.defects.append(Defect(kind, detail, name, offset))

    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        return bad("entry", "the entry lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        return bad("dtype", f"unknown dtype {str(entry['dtype'])[:40]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        return bad("shape", f"shape {str(shape)[:80]} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        return bad("offsets", f"data_offsets {str(offsets)[:80]} are not two byte positions")
    first, last = offsets
    if first > last:
        return bad("offsets", f"data_offsets [{first:,}, {last:,}] end before they begin")
    numel = math.prod(shape)
    want = dtype.nbytes(numel) if numel <= MAX_NUMEL else None
    if want is None or want != last - first:
        need = "more than can be addressed" if want is None else f"{want:,}"
        return bad("size", f"{dtype.name} {shape} takes {need} bytes, data_offsets span {last - first:,}")
    end = shard.data_begin + last
    return bad("truncated", f"ends at byte {end:,}, the file has {shard.size:,}", end)


def _check_coverage(shard: Shard) -> None:
    """Tensors must lie one behind the other without a hole, from the header to the end of the file."""
    at = shard.data_begin
    previous = None
    # Entries already found faulty leave holes that are theirs, not a second fault.
    faulty = any(d.kind in ("entry", "dtype", "shape", "offsets", "size", "truncated") for d in shard.defects)
    for info in shard.tensors:
        if info.begin < at and info.nbytes:
            shard.defects.append(
                Defect(
                    "overlap",
                    f"begins at byte {info.begin:,}, inside {previous}, which ends at {at:,}",
                    info.name,
                    info.begin,
                )
            )
        elif info.begin > at and not faulty:
            shard.defects.append(
                Defect("hole", f"{info.begin - at:,} bytes before it belong to no tensor", info.name, at)
            )
        if info.end >= at:
            at, previous = info.end, info.name
    if at < shard.size and not faulty:
        shard.defects.append(
            Defect("trailing", f"{shard.size - at:,} bytes after the last tensor belong to none", None, at)
        )


class ShardFile:
    """An open shard: reads ranges, counts the bytes it gave out, never maps, never seeks a shared position.

    One object may be read from several threads; `bytes_read` is the caller's to sum per thread.
    """

    def __init__(self, path: str | os.PathLike, name: str):
        self.name = name
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def fileno(self) -> int:
        return self._fd

    @property
    def plain(self) -> bool:
        """Whether what `read_into` gives is what lies at that offset of the file `fileno`: a subclass makes something
        else of it.
        """
        return type(self).read_into is ShardFile.read_into

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, n: int) -> bytes:
        """Up to n bytes at offset; fewer only at the end of the file."""
        parts = []
        while n > 0:
            part = os.pread(self._fd, min(n, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            n -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from offset. Raises BadCheckpoint when the file ends before that."""
        done = 0
        while done < len(buffer):
            n = os.preadv(self._fd, [buffer[done:]], offset + done)
            if n == 0:
                raise self.ended(offset + done, len(buffer) - done)
            done += n

    def ended(self, at: int, missing: int) -> BadCheckpoint:
        return BadCheckpoint(
            f"{self.name}: ends at byte {at:,} while {missing:,} more were to come; it became shorter while it was read.",
            "Run the command again when nothing writes to it.",
        )

    def blocks(self, begin: int, end: int, step: int = CHUNK_BYTES) -> Iterator[tuple[int, memoryview]]:
        """Consecutive (offset, bytes) of [begin, end); the buffer is reused, so copy what must outlive the step."""
        buffer = memoryview(bytearray(min(step, max(end - begin, 1))))
        for at in range(begin, end, len(buffer)):
            part = buffer[: end - at]
            self.read_into(at, part)
            yield at, part

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def open_shard(path: str | os.PathLike, name: str) -> Shard:
    """Header of one local file. An unreadable file is a Shard with one defect, never an exception."""
    try:
        with ShardFile(path, name) as file:
            return parse_header(name, file.size(), file.read)
    except OSError as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        return Shard(name, size, defects=[Defect("unreadable", error.strerror or str(error))])


def header_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON header, padded to 8 bytes, of (name, dtype, shape, bytes) of tensors that lie one behind the other.

    metadata: what `__metadata__` holds beside the format, which transformers 4 wants named. Raises DoctorError where two
    tensors have one name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        if name in header:
            raise DoctorError(
                _("{name}: two tensors of the output have this name; every tensor needs its own.", name=name)
            )
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
