"""Hidden states of all calibration batches between two decoder layers: on the device, in memory, or in a spill file."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch

from doctor.quant.forward.spill import SpillFile

_CPU = torch.device("cpu")


class HiddenStates:
    """Hidden states of every batch, taken and given on `device`.

    Each is [rows, length, hidden]; a model with several residual streams has an axis more, before or behind these two.
    tokens: rows times length of each. They stay on the device where they take at most `device_capacity` bytes, else in
    memory, or in a spill file above `limit` bytes.
    """

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        tokens: list[int],
        limit: int,
        spill_file: Callable[[], SpillFile],
        device: torch.device = _CPU,
        dtype: torch.dtype = torch.float32,
        device_capacity: int = 0,
    ):
        self._shapes, self._device, self._dtype, self.tokens = shapes, device, dtype, tokens
        sizes = [math.prod(shape) for shape in shapes]
        self._ends = list(accumulate(sizes))
        total = self.nbytes = dtype.itemsize * sum(sizes)
        self.on_device = device.type != "cpu" and total <= device_capacity
        self.on_disk = not self.on_device and total > limit
        if self.on_disk:
            self._file = spill_file()
            self._offset = self._file.reserve(total)
        else:
            self._all = torch.empty(sum(sizes), dtype=dtype, device=device if self.on_device else "cpu")

    def __len__(self) -> int:
        """Batches."""
        return len(self._shapes)

    def _begin(self, number: int) -> int:
        """The first element of a batch."""
        return self._ends[number] - math.prod(self._shapes[number])

    def _part(self, number: int) -> torch.Tensor:
        return self._all[self._begin(number) : self._ends[number]].view(self._shapes[number])

    def _place(self, number: int) -> int:
        return self._offset + self._dtype.itemsize * self._begin(number)

    def __getitem__(self, number: int) -> torch.Tensor:
        if not self.on_disk:
            return self._part(number).to(self._device)
        found = torch.empty(self._shapes[number], dtype=self._dtype)
        self._file.restore(self._place(number), found.untyped_storage())
        return found.to(self._device)

    def __setitem__(self, number: int, value: torch.Tensor) -> None:
        if self.on_disk:
            # a copy where the tensor is not the whole of its storage
            whole = torch.empty(self._shapes[number], dtype=self._dtype).copy_(value)
            self._file.spill(self._place(number), whole.untyped_storage())
        else:
            self._part(number).copy_(value)


def batch_shape(first: torch.Tensor, of: torch.Tensor, ids: torch.Tensor) -> tuple[int, ...]:
    """The shape of the hidden states of a batch `ids` int64[rows, length], by those (`first`) of the batch `of`."""
    shape = list(first.shape)
    at = next(i for i in range(len(shape) - 1) if tuple(shape[i : i + 2]) == tuple(of.shape))
    return (*shape[:at], *ids.shape, *shape[at + 2 :])


def make_batches(rows: list[list[int]], tokens: int) -> list[torch.Tensor]:
    """Batches int64[rows, length] of equally long rows, about `tokens` each, in the order of the rows: no padding. A
    row with images or sound is a batch of its own.
    """
    return [torch.tensor(batch, dtype=torch.int64) for batch in _grouped(rows, tokens)]


def inputs_of_batches(rows: list[list[int]], tokens: int) -> dict[int, dict[str, torch.Tensor]]:
    """What the processor made of rows with images or sound, by the number of their batch."""
    return {
        number: batch[0].inputs  # type: ignore[attr-defined]
        for number, batch in enumerate(_grouped(rows, tokens))
        if _is_seen(batch[0])
    }


def _grouped(rows: list[list[int]], tokens: int) -> list[list[list[int]]]:
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        last = batches[-1] if batches else None
        alone = last is None or _is_seen(row) or _is_seen(last[0])
        if last is None or alone or len(last[0]) != len(row) or (len(last) + 1) * len(row) > tokens:
            batches.append([row])
        else:
            last.append(row)
    return batches


def _is_seen(row: list[int]) -> bool:
    return hasattr(row, "inputs")
