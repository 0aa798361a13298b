"""SmoothQuant's factors of input channels, for activations that are rounded to integers a token at a time.

A token's scale is its largest value on 127, so one large channel costs all others their digits. Dividing it by s and
multiplying the weight's column by s moves that cost into the weight, whose rows are rounded under scales of their own.
The published factors are max |x_j|^a / max |w_j|^(1 - a) with one a for a model; here a is chosen for each group of
linears, by the noise that both roundings put into its output: with steps d of the tokens and d_i of the rows, rounding
adds d^2/12 to every scaled input and d_i^2/12 to every scaled weight.

Source: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438) section 4.
"""

from __future__ import annotations

import torch

from doctor.quant.solve.awq_source import Source

ALPHAS = tuple(step / 20 for step in range(4, 20))
_STEPS = 127.0
_TYPICAL = 3.0  # root mean squares that a channel reaches in a usual token: its largest value of all is rarer
_WORTH = 0.9  # of the noise without factors, above which none are folded: the noise is an estimate


def smooth_scales(
    weights: list[torch.Tensor], source: Source, *, H: torch.Tensor, channels: torch.Tensor
) -> tuple[torch.Tensor, str]:
    """(s f32 of the source's channels, how it was found or "") for weights [n_i, k] that share an input of H f32[k, k]
    = 2/n X^T X, whose channels reach |x| f32[k]. s is 1 with "" where nothing is better, and for channels that
    calibration never reached.
    """
    seen = source.largest(channels)
    tall = source.largest(torch.stack([W.abs().amax(0) for W in weights]).amax(0).to(torch.float32))
    live = (seen > 0) & (tall > 0)
    seen, tall = torch.where(live, seen, 1.0), torch.where(live, tall, 1.0)
    energy = H.diagonal() / 2
    reached = torch.minimum(channels, _TYPICAL * energy.sqrt())
    best, note = torch.ones_like(seen), ""
    least = _WORTH * _noise(weights, reached, energy, source.spread(best))
    for alpha in ALPHAS:
        s = seen**alpha / tall ** (1 - alpha)
        s = torch.where(live, s / s[live].log().mean().exp(), 1.0).clamp(1e-4, 1e4)
        noise = _noise(weights, reached, energy, source.spread(s))
        if noise < least:
            best, note, least = s, f"max(x)^{alpha:g} / max(w)^{1 - alpha:g}", noise
    return best, note


def _noise(weights: list[torch.Tensor], reached: torch.Tensor, energy: torch.Tensor, s: torch.Tensor) -> float:
    """Mean squared noise of the outputs, but for a factor: that of rounded inputs and that of rounded weights."""
    token = (reached / s).amax() / _STEPS
    total = 0.0
    for W in weights:
        scaled = W.to(torch.float32) * s
        rows = scaled.abs().amax(1) / _STEPS
        total += float(token.square() * scaled.double().square().sum())
        total += float(rows.double().square().sum() * (energy / s.square()).double().sum())
    return total
