"""One batch's forward through a decoder layer: suspended, resumed, and its tensors spilled to disk meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from doctor.core.messages import _
from doctor.quant.forward.held_storages import HeldStorages
from doctor.quant.forward.spill import SpillFile

try:
    from greenlet import GreenletExit, greenlet
except ImportError:
    GreenletExit = greenlet = None

WITHOUT_GREENLET = _(
    "greenlet is not installed: every stage runs its decoder layer from the start, about three times the forward work"
)

Reached = list[tuple[int, Callable[[], torch.Tensor]]]  # (group of the stage, function that gives its input)


class SuspendedForward:
    """One batch on its way. `stage` and `reached` say where it is suspended. Without a coroutine it restarts for
    every stage.

    spill_file: where its tensors go while it is suspended and memory has no capacity for them; None: memory holds all.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], coroutine: bool, spill_file: SpillFile | None = None):
        self.stage = -1
        self.reached: Reached = []
        self._output: torch.Tensor | None = None
        self._compute = compute
        self._coroutine = coroutine
        self._body: Any = greenlet(compute) if coroutine else None
        self.spill_file = spill_file
        self._held = HeldStorages() if spill_file else None
        self._offset, self._reserved, self._in_memory = 0, 0, 0
        self._spilled: list[tuple[torch.UntypedStorage, int, int]] = []  # storage, its bytes, their offset

    @property
    def resumable(self) -> bool:
        """Whether it can be suspended and resumed."""
        return self._coroutine

    @property
    def finished(self) -> bool:
        return self._body.dead

    def resume(self) -> None:
        """Run to where it suspends next, or to its end."""
        self.restore()
        self.reached = []
        tracking: AbstractContextManager = self._held or nullcontext()
        with tracking:
            self._output = self._body.switch()

    def suspend(self, stage: int, reached: Reached) -> None:
        """Called inside the forward."""
        self.stage, self.reached = stage, reached
        self._body.parent.switch()

    def spill(self, kept_by_modules: Callable[[], set[int]], capacity: int) -> int:
        """Spill what it holds, except `capacity` bytes of it and the storages that modules keep too. Returns the
        capacity left.
        """
        if self.spill_file is None or self._held is None or self.finished or self._spilled:
            return capacity
        excess = {}
        for key, storage in self._held.storages().items():
            size = storage.nbytes()
            if size <= capacity:
                capacity, self._in_memory = capacity - size, self._in_memory + size
            elif storage.resizable():
                excess[key] = storage, size
        kept = kept_by_modules() if excess else set()  # asked for only then: it looks through every expert
        moved = [entry for key, entry in excess.items() if key not in kept]
        size = sum(size for _storage, size in moved)
        if size > self._reserved:
            self._offset, self._reserved = self.spill_file.reserve(size), size
        at = self._offset
        for storage, size in moved:
            self.spill_file.spill(at, storage)
            self._spilled.append((storage, size, at))
            at += size
            storage.resize_(0)
        return capacity

    def restore(self) -> int:
        """Bring everything it holds back to memory. Returns the capacity that it took there while it was suspended."""
        spilled, self._spilled = self._spilled, []
        for storage, size, offset in spilled:
            storage.resize_(size)
            if self.spill_file is not None:
                self.spill_file.restore(offset, storage)
        kept, self._in_memory = self._in_memory, 0
        return kept

    def output(self) -> torch.Tensor:
        """The layer's output: runs to the end."""
        if not self._coroutine:
            return self._compute()
        while not self.finished:
            self.resume()
        output, self._output = self._output, None
        assert output is not None
        return output

    def close(self) -> None:
        """End it without finishing."""
        if self._coroutine and not self.finished:
            self._body.throw(GreenletExit)
