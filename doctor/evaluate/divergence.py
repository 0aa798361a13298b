"""How far a quantized directory is from its original on given rows: one figure, both models streamed layer by layer."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.evaluate.compare import streamed_pair, walk
from doctor.evaluate.scores import Tally


def divergence(original: Checkpoint, quantized: Path, rows: list[torch.Tensor], device: str = "cpu") -> float:
    """KL(original || quantized) of the next token, the mean in nats over rows of ids int64[1, length]; NaN where a row
    of logits is not finite.
    """
    a, b = streamed_pair(original, Checkpoint.open(quantized), rows, device)
    walk((a, b))
    tally = Tally()
    for ids, left, right in zip(rows, a.logits(), b.logits(), strict=True):
        tally.add(left[:-1], right[:-1], ids[0, 1:])
    return math.nan if any(tally.nonfinite) else tally.divergence()[0]
