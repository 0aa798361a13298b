"""One safetensors file: its header, validated entry by entry, and its bytes, read once.

The format's own reader stops at the first fault and names at most one tensor. Here a fault becomes a `Defect` (data
that rules turn into findings) and reading goes on with every valid entry, so that one damaged entry does not hide the
other four hundred. Nothing is memory-mapped: a truncated or failing file raises OSError instead of SIGBUS.

Rules of the format: safetensors `safetensors/src/tensor.rs` (0.8).
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

from doctor.checkpoint.crowd import crowd_of, is_crowd
from doctor.checkpoint.dtypes import DTYPES, Dtype
from doctor.checkpoint.not_safetensors import other_kind
from doctor.checkpoint.regular import open_regular
from doctor.core.collection import uncollected
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _

MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a longer header is refused by every reader
CHUNK_BYTES = 1 << 20  # 1 MiB: larger reads were no faster and cost memory per worker
MAX_DIMS = 64  # no tensor has more; a header that says so is hostile or damaged
MAX_NUMEL = 1 << 62  # above, byte offsets no longer fit signed 64 bits
MAX_LISTED = 1001  # defects of a kind with a text, one more than rules report; a hostile header can hold a million


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
    """One fault of a file. kind: a word that rules select by; detail: a phrase with the numbers."""

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
    counts: Counter[str] = field(default_factory=Counter)  # defects of each kind of entry
    cut_at: int = 0  # where the last tensor ends that the file does not hold whole; 0 for none

    @property
    def data_begin(self) -> int:
        return 8 + self.header_bytes

    def fault(self, tensor: str, kind: str, detail: Callable[[], str], offset: int | None = None) -> None:
        """Count a defect of an entry, and keep the first MAX_LISTED of a kind with their texts."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_LISTED:
            self.defects.append(Defect(kind, detail(), tensor, offset))


def parse_header(name: str, size: int, read) -> Shard:
    """Read and validate the header of a shard of `size` bytes. `read(offset, n) -> bytes` may return fewer at the
    end.
    """
    shard = Shard(name, size)
    head = read(0, min(8, size))
    if size < 8:
        shard.defects.append(Defect("too-small", _("{size} bytes; the header length alone takes 8", size=size)))
        return shard
    (length,) = struct.unpack("<Q", head)
    other = other_kind(read(0, min(512, size)), size, MAX_HEADER_BYTES)
    if other is not None:
        shard.defects.append(Defect(*other))
        return shard
    if length > MAX_HEADER_BYTES:
        shard.defects.append(
            Defect(
                "header-length",
                _(
                    "header length {length:,} is over the format's limit of {limit:,}",
                    length=length,
                    limit=MAX_HEADER_BYTES,
                ),
            )
        )
        return shard
    if length + 8 > size:
        shard.defects.append(
            Defect("truncated", _("the header needs {need:,} bytes, the file has {size:,}", need=length + 8, size=size))
        )
        return shard
    shard.header_bytes = length
    with uncollected():
        _parse_json(shard, read(8, length))
    return shard


def _parse_json(shard: Shard, raw: bytes) -> None:
    duplicates: list[str] = []

    def pairs(items):
        seen = dict(items)
        if len(seen) < len(items):
            met: set[str] = set()
            for key, _value in items:
                if key in met:
                    duplicates.append(key)
                met.add(key)
        return seen

    try:
        header = json.loads(raw.decode("utf-8").rstrip(" \n\r\t"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        shard.defects.append(Defect("header-json", _("the header is not UTF-8 at byte {byte}", byte=8 + error.start)))
        return
    except (ValueError, RecursionError) as error:
        shard.defects.append(Defect("header-json", _("the header is not JSON: {error}", error=str(error)[:120])))
        return
    if not isinstance(header, dict):
        shard.defects.append(
            Defect("header-json", _("the header is a JSON {kind}; it must be an object", kind=type(header).__name__))
        )
        return
    for key in duplicates:
        shard.fault(key, "duplicate-name", lambda: _("the name is twice in the header; readers keep the last"))
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        shard.defects.append(Defect("metadata", _("__metadata__ must map strings to strings")))
        metadata = None
    shard.metadata = metadata
    room = shard.size - shard.data_begin
    if is_crowd(header, room):
        shard.defects.append(Defect("crowd", crowd_of(len(header), room)))
        return
    _read_entries(shard, header)
    shard.tensors.sort(key=itemgetter(4, 5, 0))  # begin, end, name
    _check_coverage(shard)


_KEYS = {"dtype", "shape", "data_offsets"}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMEL  # True and False are ints too, but of another type


def _read_entries(shard: Shard, header: dict[str, Any]) -> None:
    """The tensors of the header's entries, and a defect of each entry that is not valid.

    Written for valid entries and for a million that are not: a large mixture of experts has 100,000.
    """
    at, file, found = shard.data_begin, shard.name, shard.tensors
    room = shard.size - at
    for name, entry in header.items():
        if type(entry) is dict:
            try:
                dtype, shape, offsets = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
                first, last = offsets
                if (
                    type(offsets) is list
                    and type(first) is int  # True and False are ints too, but of another type
                    and type(last) is int
                    and 0 <= first <= last <= room
                    and type(shape) is list
                    and len(shape) <= MAX_DIMS
                ):
                    numel = 1
                    for length in shape:
                        if type(length) is not int or not 0 <= length <= MAX_NUMEL:
                            break
                        numel *= length
                    else:
                        if numel * dtype.bits == 8 * (last - first):
                            found.append(TensorInfo(name, dtype, tuple(shape), file, at + first, at + last))
                            continue
            except (KeyError, TypeError, ValueError):
                pass
            _faulty(shard, name, entry)
        elif shard.counts["entry"] < MAX_LISTED:
            _faulty(shard, name, entry)
        else:
            shard.counts["entry"] += 1


def _faulty(shard: Shard, name: str, entry: Any) -> None:
    """Add the defect of an invalid entry."""

    bad = partial(shard.fault, name)
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        return bad("entry", lambda: _("the entry lacks dtype, shape or data_offsets"))
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        return bad("dtype", lambda: _("unknown dtype {dtype!r}", dtype=str(entry["dtype"])[:40]))
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        return bad("shape", lambda: _("shape {shape} is not a list of sizes", shape=str(shape)[:80]))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        return bad("offsets", lambda: _("data_offsets {offsets} are not two byte positions", offsets=str(offsets)[:80]))
    first, last = offsets
    if first > last:
        return bad(
            "offsets", lambda: _("data_offsets [{begin:,}, {end:,}] end before they begin", begin=first, end=last)
        )
    numel = math.prod(shape)
    want = dtype.nbytes(numel) if numel <= MAX_NUMEL else None
    if want is None or want != last - first:
        values = {"dtype": dtype.name, "shape": str(shape), "span": last - first}
        return bad(
            "size",
            (lambda: _("{dtype} {shape} takes more bytes than can be addressed, data_offsets span {span:,}", **values))
            if want is None
            else (lambda: _("{dtype} {shape} takes {need:,} bytes, data_offsets span {span:,}", need=want, **values)),
        )
    end = shard.data_begin + last
    shard.cut_at = max(shard.cut_at, end)
    return bad(
        "truncated",
        lambda: _("ends at byte {byte:,}, the file has {size:,} bytes", byte=end, size=shard.size),
        end,
    )


def _check_coverage(shard: Shard) -> None:
    """Add a defect where tensors are not contiguous from the end of the header to the end of the file."""
    at = shard.data_begin
    previous = None
    # An invalid entry leaves a hole, which is not a second fault.
    faulty = bool(shard.counts.keys() - {"duplicate-name"})
    for info in shard.tensors:
        if info.begin < at and info.end > info.begin:
            _overlap(shard, info, previous, at)
        elif info.begin > at and not faulty:
            _hole(shard, info, at)
        if info.end >= at:
            at, previous = info.end, info.name
    if at < shard.size and not faulty:
        shard.defects.append(
            Defect(
                "trailing", _("{count:,} bytes after the last tensor belong to none", count=shard.size - at), None, at
            )
        )


def _overlap(shard: Shard, info: TensorInfo, previous: str | None, at: int) -> None:
    """Add the defect of a tensor that begins inside the one before it, which ends at byte `at`."""
    shard.fault(
        info.name,
        "overlap",
        lambda: _(
            "begins at byte {begin:,}, inside {other}, which ends at {end:,}",
            begin=info.begin,
            other=previous,
            end=at,
        ),
        info.begin,
    )


def _hole(shard: Shard, info: TensorInfo, at: int) -> None:
    """Add the defect of bytes from `at` to a tensor's first one."""
    shard.fault(
        info.name, "hole", lambda: _("{count:,} bytes before it belong to no tensor", count=info.begin - at), at
    )


class ShardFile:
    """An open shard that is read by ranges. It may be read from several threads: no shared file position is used."""

    def __init__(self, path: str | os.PathLike, name: str):
        self.name = name
        self.path = os.fspath(path)
        self._fd = open_regular(self.path)

    def fileno(self) -> int:
        return self._fd

    @property
    def plain(self) -> bool:
        """Whether `read_into` gives the bytes of the file itself. A subclass may give others."""
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
            _(
                "{file}: ends at byte {byte:,} while {missing:,} more were expected: it became shorter while it was "
                "read.",
                file=self.name,
                byte=at,
                missing=missing,
            ),
            _("Run the command again when nothing writes to the file."),
        )

    def blocks(self, begin: int, end: int, step: int = CHUNK_BYTES) -> Iterator[tuple[int, memoryview]]:
        """Consecutive (offset, bytes) of [begin, end). The buffer is reused: copy what must outlive the step."""
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
    except BadCheckpoint as error:
        return Shard(name, 0, defects=[Defect("unreadable", error.message)])
