"""What of a quantized checkpoint can be tuned without touching a code: group scales and norm gains.

A parameter is a relative change, zero at the start. A scale becomes scale * (1 + change); a norm's factor becomes
factor * (1 + change), whichever way the module stores it: some families store the factor less one. Changes are kept
within BOUND, so no scale vanishes or changes its sign.

Sources: Chen et al. 2024, EfficientQAT (arXiv 2407.11062) §3.2 for step sizes that are trained end to end; Li et al.
2023, Norm Tweaking (arXiv 2309.02784) for gains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from doctor.quant.block_change import NewValue

BOUND = 0.5  # a change stays within ± this


@dataclass(frozen=True, kw_only=True)
class Scales(ABC):
    """What multiplies the codes of one linear. tensor: the name of what is stored; scale f32[n, m]: what changes are
    relative to; bits: of a code.

    Its codes are not here, because they need not stay in memory: `levels` are what each subclass says.
    """

    tensor: str
    scale: torch.Tensor
    bits: int

    @abstractmethod
    def weight(self, change: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """W f32 under scale * (1 + change f32[n, m]), in the module's shape."""

    @abstractmethod
    def gradient(self, slope: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """The slope f32[n, m] of a change, from the slope of weight() in the module's shape; `slope` is overwritten."""

    @abstractmethod
    def stored(self, change: torch.Tensor) -> NewValue:
        """What to write."""

    @abstractmethod
    def rounded(self, change: torch.Tensor) -> torch.Tensor:
        """The change f32[n, m] that is left once the scales are rounded to their stored type."""


@dataclass(frozen=True, kw_only=True)
class GroupScales(Scales):
    """One scale for each group of columns, f32[n, G]. group i64[k]: of each column; None where groups are runs of
    k / G columns. dtype: of the stored scales; columns_first: they are stored [G, n]; transposed: the module holds
    [k, n].

    levels [n, k], integers: code less zero point.
    """

    group: torch.Tensor | None
    dtype: torch.dtype
    columns_first: bool
    transposed: bool = False

    def weight(self, change: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        W = self._spread(self.scale * (1 + change), levels.shape[1]).mul_(levels)
        return W.T.contiguous() if self.transposed else W

    def gradient(self, slope: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        product = (slope.T if self.transposed else slope).mul_(levels)
        return self._gathered(product).mul_(self.scale)

    def stored(self, change: torch.Tensor) -> torch.Tensor:
        """The scales to write, rounded to their dtype, in their stored shape."""
        scale = (self.scale * (1 + change)).to(self.dtype)
        return scale.T.contiguous() if self.columns_first else scale

    def rounded(self, change: torch.Tensor) -> torch.Tensor:
        kept = (self.scale * (1 + change)).to(self.dtype).to(torch.float32)
        return torch.where(self.scale != 0, kept / self.scale - 1, 0.0)

    def _spread(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        if self.group is not None:
            return values[:, self.group]
        return values.repeat_interleave(columns // values.shape[1], dim=1)

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        n, groups = self.scale.shape
        if self.group is not None:
            return torch.zeros_like(self.scale).index_add_(1, self.group, values)
        return values.reshape(n, groups, -1).sum(-1)


@dataclass(frozen=True)
class Gain:
    """The weight of one norm. value f32[m] as stored; less: 1 where the module multiplies by 1 + value, else 0."""

    tensor: str
    value: torch.Tensor
    less: int
    dtype: torch.dtype

    def weight(self, change: torch.Tensor) -> torch.Tensor:
        """The weight f32[m] under factor * (1 + change f32[m])."""
        return (self.value + self.less) * (1 + change) - self.less

    def gradient(self, slope: torch.Tensor) -> torch.Tensor:
        """The slope f32[m] of a change, from the slope of weight()."""
        return slope * (self.value + self.less)

    def stored(self, change: torch.Tensor) -> torch.Tensor:
        return self.weight(change).to(self.dtype)

    def rounded(self, change: torch.Tensor) -> torch.Tensor:
        """The change f32[m] that is left once the weight is rounded to its dtype."""
        factor = self.value + self.less
        kept = self.stored(change).to(torch.float32) + self.less
        return torch.where(factor != 0, kept / factor - 1, 0.0)


Tunable = Scales | Gain


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm with one factor a channel."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and "norm" in type(module).__name__.lower()


def offset_of(norm: nn.Module, size: int) -> int:
    """1 where a norm with weights of zero still passes its input on, because it multiplies by 1 + weight; else 0.

    Raises what the module raises on an input f32[1, size].
    """
    held = dict(norm._parameters)
    try:
        for name, parameter in held.items():
            if parameter is not None:
                norm._parameters[name] = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
        with torch.no_grad():
            return int(bool(norm(torch.ones(1, size) + torch.arange(size) / size).abs().max() > 0))
    finally:
        norm._parameters.update(held)
