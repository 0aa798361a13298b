"""A shard as it will be written: which bytes come from the source, which are literal, and which are computed.

Bytes that no edit touches are runs of the source file; an edited tensor is computed slab by slab while it is read.
"""

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.header_text import header_bytes
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.messages import _
from doctor.edits.arithmetic import CASTS, apply, edited_info, pad_positions
from doctor.edits.derived import DerivedTensor, no_whole_bytes
from doctor.edits.kinds import DERIVED, CastTensor, Edit, PadTensor, RenameTensor
from doctor.edits.stale import stale

IOV_PARTS = 512  # parts of one scattered read; the kernel takes 1,024


class PlannedTensor(NamedTuple):
    """One tensor of an edited shard: before the edits that change codes in place, after all edits, and how it is
    made.
    """

    old: TensorInfo
    new: TensorInfo
    edits: Sequence[Edit]
    derived: DerivedTensor | None


@dataclass
class Piece:
    """Bytes [begin, end) of an edited shard: literal `data`, a run of the source at `source`, or one edited tensor."""

    begin: int
    end: int
    data: bytes | None = None
    source: int | None = None
    tensor: "EditedTensor | None" = None


class EditedTensor:
    """One tensor under its edits, readable by leading rows in any order. `derived` replaces the stored tensor `old`
    where it is given.
    """

    def __init__(self, old: TensorInfo, new: TensorInfo, edits: Sequence[Edit], derived: DerivedTensor | None = None):
        self.old, self.new, self.derived = old, new, derived
        self.shape = new.shape or (1,)
        # Padding of axis 0 happens where slabs are joined, everything else inside a slab.
        self.inner = [e for e in edits if not (isinstance(e, DERIVED) or (isinstance(e, PadTensor) and e.axis == 0))]
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
        if self.inner or self.derived is not None:
            out[places] = apply(self._read(file, first, last), self.old, self.inner)
        else:
            self._scatter(file, first, places, out)
        return out

    def _read(self, file: ShardFile, first: int, last: int) -> np.ndarray:
        """Rows before the edits that change codes in place."""
        if self.derived is not None:
            return self.derived.rows(first, last)
        codes = np.empty((last - first, *(self.old.shape or (1,))[1:]), CODE_NUMPY[self.old.dtype.name])
        ShardFile.read_into(file, self.old.begin + first * self.old_row_bytes, _bytes(codes))
        return codes

    def _scatter(self, file: ShardFile, first: int, places: np.ndarray, out: np.ndarray) -> None:
        """Read source rows from `first` on directly to their places: neighbours that stay neighbours are one part of a
        read.
        """
        target, offset, row = _bytes(out), self.old.begin + first * self.old_row_bytes, self.row_bytes
        begins = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        ends = np.append(begins[1:], len(places))
        parts = [
            target[place * row : (place + n) * row]
            for place, n in zip(places[begins].tolist(), (ends - begins).tolist(), strict=True)
        ]
        for i in range(0, len(parts), IOV_PARTS):
            group = parts[i : i + IOV_PARTS]
            wanted = sum(map(len, group))
            if os.preadv(file.fileno(), group, offset) != wanted:
                at = offset
                for part in group:  # a short read: part by part, which also reports where the file ends
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
    """A shard as it will be written, opened on its source. `pieces` follow each other from byte 0."""

    def __init__(self, path: str | os.PathLike, name: str, pieces: list[Piece]):
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
            raise BadCheckpoint(
                _("{file}: has {size:,} bytes; byte {end:,} was requested.", file=self.name, size=self.size(), end=end)
            )
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
        elif piece.source is not None:
            super().read_into(piece.source + offset, buffer)


def checked_info(info: TensorInfo, edits: Sequence[Edit]) -> TensorInfo:
    """The tensor's entry after its edits. Raises PlanRefused for an edit that does not fit it."""
    if not edits:
        return info
    if info.dtype.name not in CODE_NUMPY and not all(isinstance(e, RenameTensor) for e in edits):
        raise PlanRefused(no_whole_bytes(info.name, info.dtype.name))
    for edit in edits:
        if isinstance(edit, CastTensor) and not {info.dtype.name, edit.dtype} <= {*CASTS}:
            raise stale(
                _(
                    "{tensor}: cannot cast {dtype} to {other}; both must be among {known}.",
                    tensor=info.name,
                    dtype=info.dtype.name,
                    other=edit.dtype,
                    known=", ".join(CASTS),
                )
            )
        if isinstance(edit, PadTensor):
            old = info.shape[edit.axis] if 0 <= edit.axis < len(info.shape) else None
            if old is None or edit.size < old or old % edit.blocks or edit.size % edit.blocks:
                raise stale(
                    _(
                        "{tensor}: axis {axis} of {shape} cannot grow to {size} in {parts} equal parts.",
                        tensor=info.name,
                        axis=edit.axis,
                        shape=list(info.shape),
                        size=edit.size,
                        parts=edit.blocks,
                    )
                )
    return edited_info(info, edits)


def lay_out(shard: Shard, parts: Sequence[PlannedTensor]) -> tuple[Shard, list[Piece]]:
    """The shard's new header and the origin of each byte of the new file; tensors keep their order."""
    metadata = {"format": "pt", **(shard.metadata or {})}
    new = [part.new for part in parts]
    header = header_bytes(((info.name, info.dtype.name, info.shape, info.nbytes) for info in new), metadata)
    size = sum(info.nbytes for info in new)
    result = Shard(shard.name, len(header) + size, len(header) - 8, metadata=metadata)
    pieces = [Piece(0, result.data_begin, data=header)]
    at = result.data_begin
    for old, planned, edits, derived in parts:
        info = planned._replace(begin=at, end=at + planned.nbytes)
        result.tensors.append(info)
        if info.nbytes:
            _join(pieces, old, info, edits, derived)
        at = info.end
    return result, pieces


def _join(
    pieces: list[Piece], old: TensorInfo, info: TensorInfo, edits: Sequence[Edit], derived: DerivedTensor | None
) -> None:
    """Append one tensor to the pieces; neighbours that no edit touches become one run."""
    last = pieces[-1]
    if any(not isinstance(e, RenameTensor) for e in edits):
        pieces.append(Piece(info.begin, info.end, tensor=EditedTensor(old, info, edits, derived)))
    elif last.source is not None and last.source + last.end - last.begin == old.begin:
        last.end = info.end
    else:
        pieces.append(Piece(info.begin, info.end, source=old.begin))
