"""For training runs: a callback of transformers' Trainer that stops at the first weight that is not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from doctor.core.messages import _
from doctor.evaluate.in_memory import check_in_memory, held_in_parts
from doctor.lint.engine import Report

log = logging.getLogger("doctor")
NONFINITE = "nonfinite-weight"  # the name of the rule


class Nonfinite(NamedTuple):
    """The first parameter with NaN or Inf."""

    name: str
    nan: int
    inf: int
    step: int

    @property
    def message(self) -> str:
        return _(
            "step {step}: {name} holds {nan:,} NaN and {inf:,} Inf; go on from the last checkpoint before it",
            step=self.step,
            name=self.name,
            nan=self.nan,
            inf=self.inf,
        )


def first_nonfinite(parameters: Iterable[tuple[str, torch.Tensor]], step: int = 0) -> Nonfinite | None:
    """The first of these named tensors with NaN or Inf, None where all are finite."""
    for name, tensor in parameters:
        # The sum of a tensor is finite only where all of it is, but for an overflow, which the count then clears up.
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach().float().sum())):
            continue
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        if nan or inf:
            return Nonfinite(name, nan, inf, step)
    return None


class StopAtNonfinite(TrainerCallback):
    """Stops a run, and saves nothing more, at the first parameter with NaN or Inf. every: steps between two looks.

    found: what stopped the run, None where nothing did. report: of doctor.check on every parameter then, None where
    nothing stopped the run or where this process holds a part of the tensors only.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every {every}: must be 1 or more")
        self.every = every
        self.found: Nonfinite | None = None
        self.report: Report | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_more: Any) -> Any:
        """Called by the Trainer after each optimizer step."""
        if model is None or state.global_step % self.every:
            return control
        self.found = first_nonfinite(model.named_parameters(), state.global_step)
        if self.found is not None:
            log.error("%s", self.found.message)
            control.should_training_stop, control.should_save = True, False
            named = dict(model.named_parameters())
            if not any(held_in_parts(p) for p in named.values()):
                self.report = check_in_memory(named, select=[NONFINITE])
        return control
