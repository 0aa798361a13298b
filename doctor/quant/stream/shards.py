"""One shard of the output for each of the source: its header is known beforehand, so every tensor has its place and
workers write theirs in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.header_text import header_bytes
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import MachineError
from doctor.core.messages import _
from doctor.fixing.filesystem import sync_folder
from doctor.formats.base import Part
from doctor.model.fused_experts import UnfusedCheckpoint
from doctor.model.linears import Linear
from doctor.quant.dequantize import to_torch
from doctor.quant.stage import FREE_SPACE, require_room
from doctor.quant.stream.choose import Chosen
from doctor.quant.stream.rounding import Rounding, largest

CHUNK_BYTES = 4 << 20  # of a tensor at a time, as it is stored: it stays in a core's cache while it is rounded
_WIDE = ("F32", "F64")  # stored as bfloat16 where they stay


@dataclass(frozen=True)
class Sums:
    """Squared errors of a rounded weight, and squared weights."""

    lost: float
    whole: float


class OutputShard:
    """One file of the output, written beside its name until every tensor of it is there."""

    def __init__(self, path: Path, infos: tuple[TensorInfo, ...], chosen: Chosen, roundings: Mapping[str, Rounding]):
        """roundings: of each rounded tensor, by its name."""
        self.path, self.infos, self.chosen, self.roundings = path, infos, chosen, roundings
        self.left = len(infos)
        self.sums: dict[str, Sums] = {}
        self._lock = threading.Lock()
        self._fd = -1

    @property
    def _beside(self) -> Path:
        return self.path.with_suffix(".tmp")

    def open(self) -> None:
        """Write the header, and make room for the rest."""
        parts = [part for info in self.infos for part in self._parts(info)]
        parts.sort(key=lambda part: -DTYPES[part.dtype].bits)
        raw = header_bytes((part.name, part.dtype, part.shape, part.nbytes) for part in parts)
        self._places, at = {}, len(raw)
        for part in parts:
            self._places[part.name] = at
            at += part.nbytes
        require_room(self.path.parent, at)
        try:
            self._fd = os.open(self._beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(self._fd, raw, 0)
            os.truncate(self._fd, at)
        except OSError as error:
            raise self._failed(error) from None

    def _parts(self, info: TensorInfo) -> list[Part]:
        """What the output has for a tensor of the source, by full names."""
        linear = self.chosen.rounded.get(info.name)
        if linear is None:
            return [Part(info.name, "BF16" if info.dtype.name in _WIDE else info.dtype.name, info.shape)]
        rounding = self.roundings[info.name]
        parts = rounding.form.parts(linear.in_features, linear.out_features, rounding.recipe.scheme)
        return [Part(f"{linear.name}.{part.name}", part.dtype, part.shape) for part in parts]

    def write(self, info: TensorInfo) -> bool:
        """Write all that one tensor becomes. Returns whether the shard is whole now. Raises NotQuantizable for values
        that cannot be rounded.
        """
        linear = self.chosen.rounded.get(info.name)
        if linear is None:
            self._copy(info)
        else:
            self._round(info, linear)
        with self._lock:
            self.left -= 1
            return self.left == 0

    def _copy(self, info: TensorInfo) -> None:
        at = self._places[info.name]
        for codes in slabs(self.chosen.view, info):
            if info.dtype.name in _WIDE:
                kept = to_torch(codes, info.dtype.name).to(torch.bfloat16).view(torch.int16).numpy()
            else:
                kept = codes
            at += self._put(kept, at)

    def _round(self, info: TensorInfo, linear: Linear) -> None:
        rounding = self.roundings[info.name]
        places = {
            part: self._places[f"{linear.name}.{part}"]
            for part in rounding.form.part_names
            if f"{linear.name}.{part}" in self._places
        }
        lost = whole = 0.0
        for W in weight_rows(self.chosen.view, info, linear, rounding.rows):
            found = rounding.round(W)
            lost, whole = lost + found.lost, whole + found.whole
            for part, tensor in found.parts.items():
                written = self._put(tensor.contiguous().view(torch.uint8).numpy(), places[part])
                if tensor.dim() > 1:  # one of the whole tensor is written again, the same
                    places[part] += written
        with self._lock:
            self.sums[linear.name] = Sums(lost, whole)

    def _put(self, array: np.ndarray, at: int) -> int:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(raw):
                done += os.pwrite(self._fd, raw[done:], at + done)
        except OSError as error:
            raise self._failed(error) from None
        return done

    def finish(self) -> None:
        """Sync, and take the name."""
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.rename(self._beside, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Where it was not finished."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, error: OSError) -> MachineError:
        return MachineError(
            _("{path}: {error}.", path=self._beside, error=error.strerror),
            FREE_SPACE,
        )


def slabs(view: Checkpoint, info: TensorInfo) -> Iterator[np.ndarray]:
    """Codes of the tensor in whole leading rows, about CHUNK_BYTES each."""
    if not info.numel:
        return
    if _is_apart(view, info.name):
        yield view.load(info.name)
        return
    yield from view.rows(info.name, CHUNK_BYTES)


def _is_apart(view: Checkpoint, name: str) -> bool:
    """Whether a tensor is one expert of a fused one, which is read at once."""
    return isinstance(view, UnfusedCheckpoint) and name not in view.source.tensors


def weight_rows(view: Checkpoint, info: TensorInfo, linear: Linear, together: int) -> Iterator[torch.Tensor]:
    """W[n, k] in the dtype that it is stored in, some rows at a time: a multiple of `together`, but for the last."""
    if linear.transposed or _is_apart(view, info.name):
        W = to_torch(view.load(info.name), info.dtype.name)
        yield W.T.contiguous() if linear.transposed else W
        return
    row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
    rows = max(1, CHUNK_BYTES // (row_bytes * together)) * together
    for codes in view.rows(info.name, rows * row_bytes):
        yield to_torch(codes, info.dtype.name)


def absmax(view: Checkpoint, info: TensorInfo, linear: Linear) -> float:
    """The largest |w| of a weight, read for this alone."""
    most = 0.0
    for W in weight_rows(view, info, linear, 1):
        W = W if W.dtype in (torch.bfloat16, torch.float32) else W.to(torch.float32)
        most = max(most, float(largest(W.contiguous(), W.shape[1]).amax()))
    return most
