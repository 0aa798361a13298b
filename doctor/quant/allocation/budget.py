"""A budget as it is asked for; needs neither torch nor a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Budget:
    """What was asked for: bits a weight of the linears that are quantized, everything stored for them counted, or bytes
    of all tensors. widths: bits that may be chosen, () for those of the format. measurement: a file of an earlier
    measurement, or where this one goes.
    """

    bpw: float | None = None
    size: int | None = None
    widths: tuple[int, ...] = ()
    measurement: Path | None = None
