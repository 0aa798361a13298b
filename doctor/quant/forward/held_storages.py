"""Tracks the tensors whose memory was allocated inside a forward and is still held."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HeldStorages(TorchDispatchMode):
    """Inside it, new storages are noted; `storages` gives those that still live. What existed before is never among
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, list[weakref.ref[torch.Tensor]]] = {}  # by storage: the tensors that were seen on it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_key(t) for t in tensors_in((*args, *(kwargs or {}).values()))}
        own = {key for key in given if self._alive(key) is not None}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in((out,)):
            key = storage_key(tensor)
            if key in own:
                self._seen[key].append(weakref.ref(tensor))
            elif key not in given:
                self._seen[key] = [weakref.ref(tensor)]
        return out

    def _alive(self, key: int) -> torch.Tensor | None:
        return next((t for t in (ref() for ref in self._seen.get(key, ())) if t is not None), None)

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """Those that live now, by key."""
        alive = {key: tensor for key in self._seen if (tensor := self._alive(key)) is not None}
        self._seen = {key: self._seen[key] for key in alive}
        return {key: tensor.untyped_storage() for key, tensor in alive.items()}


def storage_key(tensor: torch.Tensor) -> int:
    """What identifies a tensor's storage while it lives."""
    return tensor.untyped_storage()._cdata


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, those inside lists, tuples and dictionaries included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
