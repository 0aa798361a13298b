"""The arguments of one decoder layer's forward for one batch, shared between batches where they are equal.

Some layers return more than hidden states, and the next layer takes it: GLM-5's indices of the keys to attend to, for
example. Such a value is known only when the layer before has run, so a call holds a `Carried` in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


class Carried:
    """What a layer returns besides hidden states, for one batch: `value` is there once the layer has run."""

    value: Any = None


@dataclass(frozen=True)
class LayerCall:
    """Arguments of one decoder layer for one batch, without the hidden states: those go to position 0 or under their
    name. carried: by its place in the layer's output, what later layers take; spent: what no later one takes. added:
    what the model adds to the hidden states before this layer (Qwen3-VL's features of an image), None for nothing.
    idle: the model passes over this layer, as Llama 3.2 Vision over cross-attention in a row without an image.
    """

    args: tuple
    kwargs: dict[str, Any]
    carried: dict[int, Carried] = field(default_factory=dict)
    spent: tuple[Carried, ...] = ()
    added: torch.Tensor | None = None
    idle: bool = False


class StopForward(Exception):
    """Ends a forward as soon as what was wanted from it is known."""


def run_layer(layer: nn.Module, hidden: torch.Tensor, call: LayerCall, *, carry: bool = True) -> torch.Tensor:
    """Output of a decoder layer with its weights. carry: keep what the next layers take of it."""
    if call.added is not None:
        hidden = hidden + call.added.to(hidden.dtype)
    if call.idle:
        return hidden
    args, kwargs = tuple(map(_value, call.args)), {k: _value(v) for k, v in call.kwargs.items()}
    if "hidden_states" in kwargs:
        out = layer(*args, **{**kwargs, "hidden_states": hidden})
    else:
        out = layer(hidden, *args, **kwargs)
    if not isinstance(out, (tuple, list)):
        return out
    if carry:
        for place, box in call.carried.items():
            box.value = out[place]
        for box in call.spent:
            box.value = None
    return out[0]


def _value(argument: Any) -> Any:
    return argument.value if isinstance(argument, Carried) else argument


def link(calls: list[LayerCall], returned: list[tuple[Carried, ...]]) -> list[LayerCall]:
    """The calls of all layers, each knowing which of the boxes that it returned a later layer takes."""
    last: dict[Carried, int] = {}
    for i, call in enumerate(calls):
        last |= dict.fromkeys((v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Carried)), i)
    return [
        replace(
            call,
            carried={place: box for place, box in enumerate(returned[i], 1) if box in last},
            spent=tuple(box for box, taken in last.items() if taken == i - 1),
        )
        for i, call in enumerate(calls)
    ]


def shared(call: LayerCall, before: LayerCall) -> LayerCall:
    """The call, with objects of the call `before` where they are equal: masks and positions are held once."""
    if call.idle or before.idle:
        return call
    return replace(
        call,
        args=tuple(_same(a, b) for a, b in zip(call.args, before.args, strict=True)),
        kwargs={k: _same(v, before.kwargs.get(k)) for k, v in call.kwargs.items()},
    )


def _same(value: Any, before: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(before, torch.Tensor):
        equal = value.shape == before.shape and value.dtype == before.dtype and torch.equal(value, before)
        return before if equal else value
    if isinstance(value, tuple) and isinstance(before, tuple) and len(value) == len(before):
        return tuple(_same(v, b) for v, b in zip(value, before, strict=True))
    return value
