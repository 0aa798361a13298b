"""What attention is given, caught on its way, and how far its logits move when a cache stands in for the keys."""

from collections.abc import Callable

import torch

from doctor.quant.forward.attention_tap import tapped


class Captured(Exception):
    """Leaves a block as soon as its attention was reached; carries what it was given."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float):
        super().__init__("attention reached")
        self.query, self.key, self.value, self.scaling = query, key, value, scaling


def capture(run: Callable[[], object]) -> Captured | None:
    """What the first attention inside run() is given, without computing it; None where run() never calls one."""

    def stop(_sdpa, module, query, key, value, mask, scaling=None, **options):
        raise Captured(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)

    with tapped(stop):
        try:
            run()
        except Captured as found:
            return found.with_traceback(None)  # its frames hold the layer's inputs and weights
    return None


def logit_error(
    query: torch.Tensor, key: torch.Tensor, cached: torch.Tensor, scaling: float, causal: bool = False
) -> float:
    """RMS change of the attention logits when `cached` stands in for `key`, both [batch, kv_heads, tokens, head_dim].

    The mean of each row is taken away first: softmax does not see it. causal: only over the tokens that a row attends
    to. NaN where the cache holds NaN.
    """
    batch, heads, tokens, dim = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], tokens, dim).float()
    total, count = 0.0, 0
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    seen = seen.tril() if causal else seen
    width = seen.sum(1, keepdim=True)
    change = (cached - key).float()
    for h in range(key.shape[1]):  # one key head at a time: [group, tokens, tokens] is the largest thing held
        off = torch.einsum("bgqd,bkd->bgqk", grouped[:, h], change[:, h]) * scaling * seen
        off = (off - off.sum(-1, keepdim=True) / width) * seen
        total += float(off.double().square().sum())
        count += batch * (heads // key.shape[1]) * int(seen.sum())
    return (total / count) ** 0.5
