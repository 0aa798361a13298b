"""Runs everything of a model but its decoder layers, and records the arguments that each layer would get.

Every layer is replaced by a function that notes its arguments and hands the hidden states on. What a layer returns
besides them is a `Carried`, so that the call of the layer that takes it can be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.forward.layer_call import Carried, LayerCall, StopForward, link

Forward = Callable[[torch.Tensor], None]  # runs the model from ids int64[rows, length]


def returned_values(layer: nn.Module, forward: Forward, ids: torch.Tensor) -> int:
    """How many values a layer returns in a tuple; 0 where it returns hidden states alone. `layer` is the first one."""
    found: list[int] = []

    def stop(module, args, output):
        found.append(len(output) if isinstance(output, (tuple, list)) else 0)
        raise StopForward

    hook = layer.register_forward_hook(stop)
    try:
        forward(ids)
    except StopForward:
        pass
    finally:
        hook.remove()
    return found[0]


def record_calls(
    layers: nn.ModuleList, forward: Forward, ids: torch.Tensor, values: int, model: str, *, adds: bool = False
) -> tuple[torch.Tensor, list[LayerCall]]:
    """(the first layer's hidden states, each layer's call) for one batch. values: how many a layer returns. adds: what
    the model adds to the hidden states between layers goes into their calls.

    Raises NotQuantizable where the model does anything else than run its layers one after another.
    """
    first, found, changes = _recorded(layers, forward, ids, values, model, adds)
    if not any(change is not None for change in changes):
        return first, found
    # What is added to other hidden states too is an addition; what is not depends on them, and no call can hold it.
    again = _recorded(layers, forward, ids, values, model, adds, offset=1.0)[2]
    if not all(map(_alike, changes, again)):
        raise _changes_between(model)
    return first, [replace(call, added=change) for call, change in zip(found, changes, strict=True)]


def _recorded(
    layers: nn.ModuleList, forward: Forward, ids: torch.Tensor, values: int, model: str, adds: bool, offset: float = 0.0
) -> tuple[torch.Tensor, list[LayerCall], list[torch.Tensor | None]]:
    """(the first layer's hidden states, each layer's call, what the model changed before each layer, None for nothing).
    offset: what a layer adds to what it gets.
    """
    calls: list[LayerCall | None] = [None] * len(layers)
    returned: list[tuple[Carried, ...]] = [()] * len(layers)
    changes: list[torch.Tensor | None] = [None] * len(layers)
    seen: list[torch.Tensor] = []  # the first layer's hidden states, and the last layer's output

    def recorder(i: int) -> Callable:
        def note(*args, **kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if seen and hidden is not seen[-1] and not _equal(hidden, seen[-1]):
                if not adds:
                    raise _changes_between(model)
                changes[i] = hidden - seen[-1]
            output = hidden + offset if offset else hidden
            seen[:] = [seen[0] if seen else hidden, output]
            named = {k: None if k == "hidden_states" else _no_cache(v) for k, v in kwargs.items()}
            calls[i] = LayerCall(tuple(map(_no_cache, args if "hidden_states" in kwargs else args[1:])), named)
            returned[i] = tuple(Carried() for _ in range(values - 1))
            return (output, *returned[i]) if values else output

        return note

    for i, layer in enumerate(layers):
        layer.forward = recorder(i)
    try:
        forward(ids)
    finally:
        for layer in layers:
            del layer.forward
    if not seen:
        raise NotQuantizable(
            _("{model} does not run its {n} decoder layers one after another.", model=model, n=len(calls)),
            _("Such a model cannot be quantized layer by layer."),
        )
    return seen[0], link([call or LayerCall((), {}, idle=True) for call in calls], returned), changes


def _changes_between(model: str) -> NotQuantizable:
    return NotQuantizable(
        _("{model} changes the hidden states between its decoder layers.", model=model),
        _("Such a model cannot be quantized layer by layer."),
    )


def _alike(change: torch.Tensor | None, again: torch.Tensor | None) -> bool:
    """Whether two changes are one, to float32's rounding."""
    if change is None or again is None:
        return change is again
    return bool(torch.allclose(change, again, rtol=1e-3, atol=1e-4 * float(change.abs().max())))


def require_all_layers(layers: nn.ModuleList, forward: Callable[[], object], model: str) -> None:
    """Raises NotQuantizable where a forward, however many values a layer returns, runs none of them or changes what
    they hand on. Where it fails before the last layer for another reason, nothing is known.
    """
    refused = None
    for values in (0, 2, 3):
        failed: list[Exception] = []

        def run(ids: torch.Tensor, failed: list[Exception] = failed) -> None:
            try:
                with torch.no_grad():
                    forward()
            except NotQuantizable:
                raise
            except Exception as error:  # weights on the meta device, most likely
                failed.append(error)

        try:
            record_calls(layers, run, torch.empty(0), values, model)
            if not failed:
                return
        except NotQuantizable as error:
            refused = refused or (None if failed else error)
    if refused is not None:
        raise refused


def _equal(left: Any, right: Any) -> bool:
    return isinstance(left, torch.Tensor) and left.shape == right.shape and torch.equal(left, right.to(left.dtype))


def _no_cache(value: object) -> object:
    """None for a KV cache, which would grow with every forward over the same rows."""
    from transformers.cache_utils import Cache

    return None if isinstance(value, Cache) else value
