"""Adam over changes that stay within BOUND.

Source: Kingma & Ba 2015 (arXiv 1412.6980).
"""

from __future__ import annotations

import torch

from doctor.quant.tuning.parameters import BOUND

BETAS = (0.9, 0.95)


class Adam:
    """Steps on `changes` f32 by name, in place. first, second: the running means of slopes and of their squares."""

    def __init__(self, changes: dict[str, torch.Tensor]):
        self.changes = changes
        self.first = {name: torch.zeros_like(x) for name, x in changes.items()}
        self.second = {name: torch.zeros_like(x) for name, x in changes.items()}

    def step(self, name: str, slope: torch.Tensor, rate: float, number: int) -> None:
        """One step of a change. number: of the step, the first is 1."""
        first, second = self.first[name], self.second[name]
        first.lerp_(slope, 1 - BETAS[0])
        second.lerp_(slope.square(), 1 - BETAS[1])
        scale = (second / (1 - BETAS[1] ** number)).sqrt_().add_(1e-12)
        self.changes[name].addcdiv_(first / (1 - BETAS[0] ** number), scale, value=-rate).clamp_(-BOUND, BOUND)
