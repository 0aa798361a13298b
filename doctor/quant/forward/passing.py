"""A model whose decoder layers pass on hidden states that were computed elsewhere, for what comes behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from doctor.quant.forward.skeleton import Skeleton


@contextmanager
def passed_layers(skeleton: Skeleton) -> Iterator[Callable[[torch.Tensor], None]]:
    """Within it, give(hidden f32[1, length, hidden]) says what the layers of the next forward give. Everything outside
    the layers must be loaded.
    """
    layers = skeleton.layers
    current: list[torch.Tensor] = []

    def give(hidden: torch.Tensor) -> None:
        current[:] = [hidden]

    def injecting(*args, **kwargs):
        return skeleton.as_output(current[0])

    def passing(*args, hidden_states=None, **kwargs):
        return skeleton.as_output(args[0] if args else hidden_states)

    try:
        layers[0].forward = injecting
        for layer in layers[1:]:
            layer.forward = passing
        yield give
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def logits(skeleton: Skeleton, ids: torch.Tensor) -> torch.Tensor:
    """Logits f32[length, vocabulary] of ids int64[1, length], whatever the layers give."""
    return skeleton.model(input_ids=ids.to(skeleton.device), use_cache=False).logits[0].float()
