"""Scales of 4-bit and 8-bit floats as files hold them: 8-bit floats under a divisor (NVFP4), powers of two (MXFP4).

A grid of 4-bit floats is an affine grid of halves whose codes 0..24 are the levels alone (doctor/formats/grid.py), so
the scale that the solver sees is half of the one that is stored. What a stored scale stands for is computed here as
readers do: the 8-bit float divided by the divisor in float32.

Sources: vllm-project/compressed-tensors 0.20 quantization/utils/helpers.py (generate_gparam, calculate_qparams) and
quantization/utils/mxfp_utils.py for the choice of a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.formats.grid import E2M1, GridKind

E2M1_MOST, E4M3_MOST = 6.0, 448.0
_E4M3_LEAST, _E4M3_NORMAL = 2.0**-9, 2.0**-6


@dataclass(frozen=True)
class FloatScale:
    """How the scales of a grid of 4-bit floats are stored.

    power: as powers of two; else as 8-bit floats, divided by `divisor`, a float32.
    """

    power: bool
    divisor: float = 1.0

    @property
    def most(self) -> float:
        """The largest scale of halves."""
        return 2.0**126 if self.power else self._halved(E4M3_MOST)

    @property
    def unit(self) -> float:
        """The scale of a group of zeros."""
        return 0.5 if self.power else self._halved(1.0)

    def _halved(self, stored: float) -> float:
        return float(torch.tensor(stored) / torch.tensor(self.divisor) * 0.5)

    def snap(self, scale: torch.Tensor) -> torch.Tensor:
        """scale f32 > 0 of halves, rounded to the nearest that a file holds, as f32; never 0."""
        if self.power:  # nearest on a logarithmic scale: up from the square root of 2
            bits = (scale.clamp(2.0**-126, 2.0**126).view(torch.int32) + (0x800000 - 0x3504F3)) & 0x7F800000
            return bits.view(torch.float32)
        divisor = torch.tensor(self.divisor, dtype=torch.float32, device=scale.device)
        stored = (scale * 2 * divisor).clamp(_E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn)
        return stored.to(torch.float32) / divisor * 0.5

    def first(self, span: torch.Tensor) -> torch.Tensor:
        """The scale of halves that the absmax f32 of a group asks for, before any search; unit for a group of zeros."""
        scale = self.snap(power_of(span) / 8) if self.power else self.snap(span / (2 * E2M1_MOST))
        return torch.where(span > 0, scale, self.unit)

    def of_values(self, span: torch.Tensor, level: float, empty: torch.Tensor | None) -> torch.Tensor:
        """Twice what `snap` gives for span / (2 * level), the scale of values that puts the absmax f32 of a group on a
        level of NVFP4; of one where `empty` is true, 2 * unit. In one buffer: a weight has many groups.
        """
        divisor = torch.tensor(self.divisor, dtype=torch.float32, device=span.device)
        scale = _to_e4m3((span / level).mul_(divisor).clamp_(_E4M3_LEAST, E4M3_MOST)).div_(divisor)
        return scale if empty is None else scale.masked_fill_(empty, 2 * self.unit)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x f32 in 2^-9 to 448, which is overwritten, rounded to 8-bit floats, ties to even. By its bits: torch takes 3 ns
    on the way back from a float8, five times as long as all of this.
    """
    if bool((x < _E4M3_NORMAL).any()):
        return x.to(torch.float8_e4m3fn).to(torch.float32)
    bits = x.view(torch.int32)
    odd = (bits >> 20).bitwise_and_(1)
    bits.add_(odd).add_(0x7FFFF).bitwise_and_(~0xFFFFF)
    return x


def power_of(span: torch.Tensor) -> torch.Tensor:
    """The power of two that a group of MX floats is scaled by: 2^n for an absmax f32 from 2^n up to 1.75 * 2^n."""
    return ((span.view(torch.int32) + 0x200000) & 0x7F800000).view(torch.float32)


def divisor_of(absmax: float) -> float:
    """NVFP4's divisor for weights up to absmax: it brings the largest scale to 448. A float32; 1 for zeros."""
    if not absmax > 0:
        return 1.0
    divisor = torch.tensor(E4M3_MOST * E2M1_MOST) / torch.tensor(absmax, dtype=torch.float32)
    return float(divisor.clamp(max=torch.finfo(torch.float32).max))


def scale_of(kind: GridKind, divisor: float) -> torch.dtype | FloatScale:
    """What the solver rounds scales to: a dtype for affine grids."""
    if kind.levels == E2M1:
        return FloatScale(not kind.divided, divisor)
    return kind.torch_scale_dtype
