"""A hand on queries, keys and values on their way into attention, after RoPE and norms: where every engine caches them.

A model with attention code of its own never comes here: what passes through is transformers' sdpa function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _

E4M3_MAX = 448.0


@contextmanager
def tapped(replacement: Callable) -> Iterator[None]:
    """Inside, transformers' sdpa attention is replacement(sdpa, module, query, key, value, attention_mask, **options).

    Query, key and value are [batch, heads, tokens, head_dim]; there may be fewer key heads than query heads. Models are
    built for sdpa (meta_model.py), so their masks stay what they were.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(replacement, before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


class CacheRange:
    """The largest |key| and |value| of each head that one decoder layer gives to attention, while `watched`."""

    def __init__(self) -> None:
        self._modules: set[int] = set()
        self.keys: torch.Tensor | None = None  # f32[kv_heads]
        self.values: torch.Tensor | None = None

    @contextmanager
    def watched(self) -> Iterator[CacheRange]:
        def look(sdpa, module: nn.Module, query, key: torch.Tensor, value: torch.Tensor, mask, **options):
            self._modules.add(id(module))
            self.keys = _larger(self.keys, key)
            self.values = _larger(self.values, value)
            return sdpa(module, query, key, value, mask, **options)

        with tapped(look):
            yield self

    def scales(self, name: str, heads: int | None, per_head: bool) -> dict[str, torch.Tensor]:
        """`k_scale` and `v_scale` of an FP8 cache, f32: [1], or [kv_heads, 1, 1] per head. heads: of the config.

        Raises NotQuantizable where they cannot be told, or are not finite.
        """
        if len(self._modules) != 1 or self.keys is None or self.values is None:
            raise NotQuantizable(
                _(
                    "{name}: {n} attentions of this layer were seen; an FP8 cache needs the keys and values of one.",
                    name=name,
                    n=len(self._modules),
                ),
                _("Leave --kv-cache out; vLLM can still be told --kv-cache-dtype fp8."),
            )
        if per_head and heads != len(self.keys):
            raise NotQuantizable(
                _(
                    "{name}: has {n} key heads, config.json says {heads}; scales of heads need one number for all.",
                    name=name,
                    n=len(self.keys),
                    heads=heads,
                ),
                _("Take one scale a layer: --kv-cache fp8."),
            )
        found = {}
        for part, most in (("k_scale", self.keys), ("v_scale", self.values)):
            most = most if per_head else most.amax(0, keepdim=True)
            if not torch.isfinite(most).all():
                raise NotQuantizable(_("{name}: keys or values are not finite, so a cache has no scale.", name=name))
            scale = torch.where(most > 0, most / E4M3_MAX, torch.ones_like(most)).cpu()  # a head of zeros: any scale
            found[part] = scale.view(-1, 1, 1) if per_head else scale
        return found


def _larger(before: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """The largest |x| of each head so far; x [batch, heads, tokens, head_dim]. NaN stays NaN."""
    now = x.detach().abs().amax(dim=(0, 2, 3)).to(torch.float32)
    return now if before is None else torch.maximum(before, now)
