"""Llama 3's scaling of rotations as GGUF has it: no key names it, the tensor rope_freqs.weight holds a divisor for each
frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_CLOSE = 1e-4  # float32 factors of one scaling computed twice agree to about 1e-6
_USUAL = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_factors(scaling: Mapping[str, Any], theta: float, dim: int) -> list[float]:
    """f32[dim / 2]: what the frequencies of Llama 3's scaled rotation are divided by, as llama.cpp reads them."""
    factor, low, high = (
        float(scaling.get(k, d)) for k, d in (("factor", 8), ("low_freq_factor", 1), ("high_freq_factor", 4))
    )
    context = float(scaling.get("original_max_position_embeddings", 8192))
    found = []
    for i in range(0, dim, 2):
        length = 2 * math.pi * theta ** (i / dim)
        if length < context / high:
            found.append(1.0)
        elif length > context / low:
            found.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def scaling_of(factors: Sequence[float], theta: float, dim: int) -> dict[str, Any] | None:
    """rope_scaling that gives these factors for heads of `dim`; None where none does.

    Between the untouched and the divided frequencies 1 / factor is linear in 1 / wavelength, which is two equations for
    three values; low_freq_factor is taken as 1, which gives the same rotations whatever it was. With fewer than two
    frequencies between, the values that Llama 3 was published with are tried.
    """
    most = max(factors, default=1.0)
    if len(factors) != dim // 2 or not math.isfinite(most) or not most > 1:
        return None
    found: dict[str, Any] = {"rope_type": "llama3", "factor": round(most, 6), **_USUAL}
    between = [i for i, f in enumerate(factors) if 1 + _CLOSE < f < most * (1 - _CLOSE)]
    if len(between) > 1:
        rate = [theta ** -(2 * i / dim) / (2 * math.pi) for i in between]
        share = [(1 / factors[i] - 1 / most) / (1 - 1 / most) for i in between]
        slope = (share[0] - share[-1]) / (rate[0] - rate[-1])
        start = share[0] - slope * rate[0]
        if not (slope > 0 and start < 0):
            return None
        high = 1 - 1 / start
        context = slope * (high - 1)
        found |= {"high_freq_factor": round(high, 4), "original_max_position_embeddings": round(context)}
    again = rope_factors(found, theta, dim)
    return found if all(abs(a - b) <= _CLOSE * b for a, b in zip(again, factors, strict=True)) else None
