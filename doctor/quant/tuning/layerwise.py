"""Tuning a layer at a time, first to last: the start of the tuning from end to end (train.py), for a fraction of its
memory and without a backward pass of the whole model.

Two streams of hidden states go through the layers: the original's, x -> y, and the quantized model's, x^. A layer's
scales and gains are tuned so that it makes y of x^, which is also what takes back errors of the layers before it:

    loss = mean over tokens of |layer^(x^; changes) - y|^2 / |y|^2

A share of each token's own size, because the next norm divides by it: a first token with massive activations would
outweigh all others together. Adam takes LAYER_STEPS steps of a few rows. Changes that do not lower the loss of the
watched rows are dropped, layer by layer.

The changes of finished layers can be saved on the way. A run that goes on from them computes those layers' outputs
again, which are the same to the bit, so hidden states need not be kept.

Sources: Chen et al. 2024, EfficientQAT (arXiv 2407.11062) §3.1 for training a block against the outputs of its
original.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.tuning.adam import Adam
from doctor.quant.tuning.saved import Saved, Tensors
from doctor.quant.tuning.student import Student
from doctor.quant.tuning.wanted import LAYER_ROWS, LAYER_STEPS

RATE = 4e-3  # relative change in one of Adam's full steps, with codes of 4 bits and more; falls linearly to 0
LAYERS = "layers"  # in a saved state
SAVES = 8  # of the changes so far: each writes all of them


@dataclass
class Settled:
    """What it found. wanted: the original's last hidden states f32[1, length, hidden], a row each. losses: of the
    watched rows, before and after each layer's own tuning.
    """

    wanted: list[torch.Tensor]
    losses: list[tuple[float, float]] = field(default_factory=list)


def settle(
    student: Student,
    teacher: Skeleton,
    rows: list[torch.Tensor],
    trained: list[int],
    watched: list[int],
    *,
    a_step: int = LAYER_ROWS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    saved: Saved | None = None,
    begun: tuple[Tensors, dict[str, Any]] | None = None,
) -> Settled:
    """Tune each layer of `student` in turn; its `changes` become those that were found. rows: ids int64[1, length] of
    both; trained and watched: numbers of rows. a_step: rows of a step. saved: where the changes of finished layers go;
    begun: what it gave of an interrupted run. Raises NotQuantizable where a loss is not finite.
    """
    floats, calls = [], []
    for hidden, call in teacher.open_calls(rows):
        floats.append(hidden)
        calls.append(call)
    states, everyone, draw = list(student.first), list(range(len(rows))), random.Random(seed)
    done, shares, first = Settled(floats), student.shares(), 0
    if begun is not None:
        tensors, state = begun
        student.changes |= tensors[LAYERS]
        first, done.losses = state[LAYERS], [(before, after) for before, after in state["losses"]]
    for i in range(len(student)):
        teacher.load_layer(i)
        with torch.no_grad():
            for r in everyone:
                floats[r] = teacher.run_layer(i, floats[r], calls[r][i])
        teacher.drop_layer(i)
        steps = _drawn(draw, trained, a_step)
        if i < first:
            states = student.run(i, states, everyone)
            continue
        before = _loss(student.run(i, [states[r] for r in watched], watched), [floats[r] for r in watched])
        kept = student.changes
        student.changes = dict(kept)
        _tune(student, i, states, floats, steps, shares)
        outputs = student.run(i, states, everyone)
        after = _loss([outputs[r] for r in watched], [floats[r] for r in watched])
        if not math.isfinite(before):
            raise NotQuantizable(
                _("tuning, layer {i}: the error of its outputs is {value}; must be finite.", i=i, value=before),
                _("`doctor verify` shows where the quantized model leaves the original."),
            )
        if not after < before:
            student.changes, after = kept, before
            outputs = student.run(i, states, everyone)
        states = outputs
        done.losses.append((before, after))
        say(_("{phase}: {done} of {total}", phase="tune layers", done=i + 1, total=len(student)))
        if saved is not None and (i + 1) % max(1, len(student) // SAVES) == 0:
            names = [name for layer in range(i + 1) for name in student.names(layer)]
            found = {name: student.changes[name] for name in names}
            saved.keep({LAYERS: found}, {LAYERS: i + 1, "losses": done.losses})
    return done


def _drawn(draw: random.Random, trained: list[int], a_step: int) -> list[list[int]]:
    """The rows of each step of a layer: all of `trained` before one comes again."""
    order: list[int] = []
    while len(order) < LAYER_STEPS * a_step:
        order += draw.sample(trained, len(trained))
    return [order[at : at + a_step] for at in range(0, LAYER_STEPS * a_step, a_step)]


def _tune(
    student: Student,
    i: int,
    states: list[torch.Tensor],
    wanted: list[torch.Tensor],
    steps: list[list[int]],
    shares: dict[str, float],
) -> None:
    """Adam over layer i's changes, of which `student.changes` gets new tensors. steps: the rows of each."""
    names = student.names(i)
    student.changes |= {name: student.changes[name].clone() for name in names}
    adam = Adam({name: student.changes[name] for name in names})
    for step, rows in enumerate(steps):
        found: dict[str, torch.Tensor] = {}

        def slope(place: int, output: torch.Tensor, rows: list[int] = rows) -> torch.Tensor:
            goal = wanted[rows[place]]
            return (output - goal) / goal.square().sum(-1, keepdim=True).clamp_min(1e-12)

        student.pull_back(i, [states[r] for r in rows], rows, slope, found)
        for name, value in found.items():
            adam.step(name, value, RATE * (1 - step / len(steps)) * shares[name], step + 1)


def _loss(outputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Mean over tokens of the squared error, as a share of the squared norm."""
    shares = [
        (x - y).square().sum(-1) / y.square().sum(-1).clamp_min(1e-12) for x, y in zip(outputs, wanted, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).mean())
