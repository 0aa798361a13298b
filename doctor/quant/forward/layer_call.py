"""The arguments of one decoder layer's forward for one batch, shared between batches where they are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, without the hidden states: those go to position 0 or under their
    name.
    """

    args: tuple
    kwargs: dict[str, Any]


class StopForward(Exception):
    """Ends a forward as soon as what was wanted from it is known."""


def shared(call: LayerCall, before: LayerCall) -> LayerCall:
    """The call, with objects of the call `before` where they are equal: masks and positions are held once."""
    return LayerCall(
        tuple(_same(a, b) for a, b in zip(call.args, before.args, strict=True)),
        {k: _same(v, before.kwargs.get(k)) for k, v in call.kwargs.items()},
    )


def _same(value: Any, before: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        equal = value.shape == before.shape and value.dtype == before.dtype and torch.equal(value, before)
        return before if equal else value
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(_same(v, b) for v, b in zip(value, before, strict=True))
    return value
