"""Copies of the tiny model that are off by noise: what a quantizer would leave, for as little as it costs."""

import numpy as np

from doctor.checkpoint.codecs import from_codes, to_bf16
from doctor.lint.testing import tiny


def noisy(folder, share, seed=0, spoil=None):
    """A copy of the tiny model whose linears are off by noise of so large a share."""
    case, draw = tiny("llama"), np.random.default_rng(seed)
    for name, codes in case.tensors.items():
        if name.endswith("_proj.weight"):
            values = from_codes(codes, "BF16")
            case.tensors[name] = to_bf16(values + share * values.std() * draw.standard_normal(values.shape))
    if spoil is not None:
        case.tensors[spoil].flat[0] = 0x7FC0
    return case.write(folder)
