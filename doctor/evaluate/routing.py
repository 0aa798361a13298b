"""Which experts two models choose: a token that goes to another expert is computed with other weights altogether.

A router stays in 16 bits, but reads hidden states that the quantized layers before it changed. So the figure says what
the whole model does, not how good a router is.

transformers' modules of experts take the router's choice as one argument, under the names in CHOICES. Llama 4's do not:
its router gives scores for all experts, 0 for those that a token did not choose.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

CHOICES = ("top_k_index", "router_indices")
_SCORES = ("Llama4Router",)  # classes of routers that give scores of all experts


def has_experts(layer: nn.Module) -> bool:
    """Whether a decoder layer is one of a mixture."""
    return any("experts" in type(module).__name__.lower() for module in layer.modules())


@contextmanager
def choices_of(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Gets the experts int64[tokens, top_k] that tokens choose in a decoder layer within it, one tensor a call; stays
    empty where the layer has none, or hands the choice on in a way that is not known.
    """
    found: list[torch.Tensor] = []
    hooks = []
    for module in layer.modules():
        if type(module).__name__ in _SCORES:
            hooks.append(module.register_forward_hook(lambda router, _args, out: found.append(_chosen(router, out[0]))))
            continue
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        name = next((name for name in CHOICES if name in names), None)
        if name is not None:

            def take(
                _module: nn.Module, args: tuple, more: dict, name: str = name, at: int = names.index(name)
            ) -> None:
                found.append(more[name] if name in more else args[at])

            hooks.append(module.register_forward_pre_hook(take, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _chosen(router: nn.Module, scores: torch.Tensor) -> torch.Tensor:
    count = router.top_k
    assert isinstance(count, int)
    return scores.topk(count, dim=-1).indices


def agreement(original: list[torch.Tensor], quantized: list[torch.Tensor]) -> float:
    """Share of the original's choices that the quantized model makes for the same token, in whatever order.

    Raises ValueError where the two were not seen for the same tokens.
    """
    shares = [(x[..., :, None] == y[..., None, :]).any(-1).double() for x, y in zip(original, quantized, strict=True)]
    return float(torch.cat([share.flatten() for share in shares]).mean())
