"""The tuning itself: KL(original || quantized) of the next token, lowered by Adam over scales and gains.

The original's last hidden states are computed once and stand for its logits, which are made from them again, a run of
tokens at a time, so that a vocabulary of 260,000 does not fill the memory. A step runs two rows through the quantized
model, one layer in memory at a time, keeps each layer's inputs, and goes back through the layers, each computed again
from its inputs. Labels play no part: the original is the teacher, so nothing is learnt that it does not know.

One row in WATCH, or those that the caller names, is never trained on. Its KL, before the first step, half way and at
the end, decides which state is kept, and whether any is: tuning that does not lower it leaves the checkpoint as it was.
Where the first half of the steps did not lower it, the second half goes on from the start at a lower rate.
The state can be saved on the way (saved.py), and a run that starts from it ends in the same bytes. layerwise.py gives
the changes to begin with.

Sources: parameters.py for what is tuned.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.forward.passing import logits, passed_layers
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.tuning.adam import Adam
from doctor.quant.tuning.parameters import Gain, is_norm
from doctor.quant.tuning.saved import Saved, Tensors
from doctor.quant.tuning.student import SlopeOf, Student, add_slope, gain_of, put, take_back
from doctor.quant.tuning.wanted import ROWS_A_STEP, TOKENS

WATCH = 8  # one row in so many is watched and not trained on
# Relative change of a scale in one of Adam's full steps, with codes of 4 bits and more; an eighth of layerwise.RATE:
# larger steps undo what the layers have settled.
RATE = 5e-4
WARM_UP = 3  # steps
LAST_SHARE = 0.02  # of RATE, in the last step
LOWER = 0.25  # of the rate, for the second half of the steps where the first did not lower the divergence
SAVE_EVERY = 4  # steps
_UNTUNED, _BY_LAYER = _("no change"), _("layer by layer")  # what the watched rows are seen under before the first step


@dataclass
class Progress:
    """How a tuning went. watched: (steps done, KL in nats a token of the watched rows), the start first."""

    watched: list[tuple[int, float]] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)  # KL of each step's rows before it

    @property
    def start(self) -> float:
        return self.watched[0][1]


class Ends:
    """What turns last hidden states into logits, of the original and of the quantized model, and KL between the two.

    stride: the logits of one token in so many are compared, where those of all would take most of the work.
    """

    def __init__(self, student: Student, teacher: Skeleton, stride: int = 1):
        self.student, self.teacher, self.stride = student.skeleton, teacher, stride
        teacher.load_ends()
        student.view.lent = _equal_embeddings(student, teacher)
        self.student.load_ends()
        student.view.lent = {}
        _share_equal(self.student.model, teacher.model)
        inside = {id(m) for m in self.student.layers.modules()}
        names = {id(m): t for t, m in _outer_tensors(student).items()}
        self.norms: list[tuple[nn.Module, Gain]] = [
            (module, gain_of(student.view, names[id(module)], module))
            for module in self.student.base.modules()
            if id(module) not in inside and is_norm(module) and id(module) in names
        ]
        for _module, gain in self.norms:
            student.changes[gain.tensor] = torch.zeros_like(gain.value)
            student.tunables[gain.tensor] = gain
        self.changes = student.changes

    def compared(self, length: int) -> int:
        """How many tokens of a row are compared."""
        return len(range(length)[:: self.stride])

    def divergence(
        self, ids: torch.Tensor, wanted: torch.Tensor, states: torch.Tensor, found: dict | None = None
    ) -> tuple[float, torch.Tensor | None]:
        """(sum over compared tokens of KL in nats, its slope for `states`) of a row's last hidden states f32[1, length,
        hidden] against the original's. found: gets the slopes of the final norm's changes; None computes no slope.
        """
        total, slope = 0.0, torch.zeros_like(states) if found is not None else None
        leaves = []
        with (
            passed_layers(self.teacher) as teach,
            passed_layers(self.student) as learn,
            torch.set_grad_enabled(found is not None),
        ):
            try:
                for module, gain in self.norms:
                    leaf = gain.weight(self.changes[gain.tensor]).requires_grad_(found is not None)
                    put(module, leaf)
                    leaves.append((gain, leaf))
                for begin in range(0, ids.shape[1], TOKENS * self.stride):
                    part = slice(begin, begin + TOKENS * self.stride, self.stride)
                    with torch.no_grad():
                        teach(wanted[:, part])
                        goal = logits(self.teacher, ids[:, part]).log_softmax(-1)
                    given = states[:, part].detach().requires_grad_(found is not None)
                    learn(given)
                    got = logits(self.student, ids[:, part])
                    with torch.no_grad():
                        loss, back = divergence_of(got.detach(), goal)
                    total += loss
                    if slope is not None:
                        got.backward(back)
                        assert given.grad is not None
                        slope[:, part] = given.grad
                if found is not None:
                    for gain, leaf in leaves:
                        if leaf.grad is not None:
                            add_slope(found, gain, leaf.grad)
            finally:
                for module, _gain in self.norms:
                    take_back(module)
        return total, slope


def divergence_of(got: torch.Tensor, goal: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(sum over tokens of KL in nats, its slope for `got`) of logits f32[tokens, vocabulary] against `goal`, the
    original's logarithms of probabilities, which is overwritten.
    """
    found = got.log_softmax(-1)
    wanted = goal.exp()
    loss = float((goal.sub_(found)).mul_(wanted).sum())
    return loss, found.exp_().sub_(wanted)


def _outer_tensors(student: Student) -> dict[str, nn.Module]:
    """Checkpoint name of a weight outside the layers -> its module."""
    found = {}
    for path, module in student.skeleton.base.named_modules():
        if "weight" in module._parameters:
            source = student.skeleton.source_of(f"{path}.weight")
            if source is not None:
                found[source] = module
    return found


def _equal_embeddings(student: Student, teacher: Skeleton) -> dict[str, torch.Tensor]:
    """The original's embeddings by the names of tensors that the quantized checkpoint stores to the same bytes: with
    the head that is tied to them they are most of what both hold, and need not be read a second time.
    """
    ours, theirs, found = student.view.source, teacher.checkpoint, {}
    for path, module in teacher.base.named_modules():
        name = teacher.source_of(f"{path}.weight") if isinstance(module, nn.Embedding) else None
        if name is None or not isinstance(theirs, Checkpoint):
            continue
        one, other = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            continue
        if all(bool((a == b).all()) for a, b in zip(ours.rows(name), theirs.rows(name), strict=True)):
            found[name] = module.get_parameter("weight").data
    return found


def _share_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Hold equal parameters of the two models once: the head of a large vocabulary is most of what both hold."""
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        other = mine.get(name)
        if other is not None and not other.is_meta and not parameter.is_meta and torch.equal(other, parameter):
            parameter.data = other.data


def last_states(
    skeleton: Skeleton, rows: list[torch.Tensor], tick: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """Outputs f32[1, length, hidden] of the last layer for each row, one layer in memory at a time."""
    states, calls = [], []
    for hidden, call in skeleton.open_calls(rows):
        states.append(hidden)
        calls.append(call)
    with torch.no_grad():
        for i in range(len(skeleton.layers)):
            skeleton.load_layer(i)
            states = [skeleton.run_layer(i, x, c[i]) for x, c in zip(states, calls, strict=True)]
            skeleton.drop_layer(i)
            tick()
    return states


def watched_of(count: int) -> list[int]:
    """Of so many rows the numbers of those that are not trained on: one in WATCH."""
    return list(range(WATCH - 1, count, WATCH)) or [count - 1]


class Trainer:
    """Adam over the changes of a student, which begins with those that it has. passes: times that each trained row is
    seen. watch: the student's rows that are not trained on; None: one in WATCH. saved: where the state goes after each
    look; begun: what it gave of an interrupted run. through: at most so many rows are trained on; None: all.
    """

    def __init__(
        self,
        student: Student,
        ends: Ends,
        wanted: list[torch.Tensor],
        *,
        passes: int,
        seed: int = 0,
        rate: float = RATE,
        say: Callable[[str], None] = lambda text: None,
        watch: list[int] | None = None,
        saved: Saved | None = None,
        begun: tuple[Tensors, dict[str, Any]] | None = None,
        through: int | None = None,
    ):
        self.student, self.ends, self.wanted, self.say, self.saved = student, ends, wanted, say, saved
        self.begun = begun
        count = len(student.rows)
        self.watch = watch or watched_of(count)
        trained = [r for r in range(count) if r not in set(self.watch)]
        order = random.Random(seed)
        self.schedule: list[list[int]] = []
        for _pass in range(passes if trained else 0):
            order.shuffle(trained)
            chosen = trained[:through]
            self.schedule += [chosen[at : at + ROWS_A_STEP] for at in range(0, len(chosen), ROWS_A_STEP)]
        self.rate, self.progress = rate, Progress()
        self.best = _zeros_of(student.changes)  # under which the watched rows diverge least
        self.adam = Adam(student.changes)
        self.shares = student.shares()
        steps = len(self.schedule)
        self.looks = {-(-steps // 2), steps}

    def train(self) -> dict[str, torch.Tensor]:
        """The changes, rounded to what is stored, under which the watched rows diverge least; all zero where tuning
        does not help. Raises NotQuantizable where a step is not finite.
        """
        begin, least = self._taken_up() if self.begun else (0, self._opening())
        opening = min(kl for step, kl in self.progress.watched if step == 0)
        for step in range(begin, len(self.schedule)):
            self._step(step, self.schedule[step])
            done = step + 1
            self.say(_("{phase}: {done} of {total}", phase="tune", done=done, total=len(self.schedule)))
            if done in self.looks:
                least = self._judged(done, least)
                if least == opening and done < len(self.schedule):
                    self._go_back()
            if done in self.looks or done % SAVE_EVERY == 0:
                self._keep(done, least)
        return self.best

    def _go_back(self) -> None:
        """To the changes of the start, at a lower rate: the steps were too large for what layer by layer has settled.
        What Adam knows of the slopes stays.
        """
        self.rate *= LOWER
        self.student.changes = self.ends.changes = {name: x.clone() for name, x in self.best.items()}
        self.adam.changes = self.student.changes

    def _opening(self) -> float:
        """The least KL before the first step: of no changes, or of those that the student came with, which are dropped
        where they do not lower it.
        """
        given = self.student.changes
        if not any(bool(change.any()) for change in given.values()):
            return self._look(0, _UNTUNED)
        self.student.changes = self.ends.changes = _zeros_of(given)
        none = self._look(0, _UNTUNED)
        self.student.changes = self.ends.changes = given
        least = self._judged(0, none)
        if least == none:
            for change in given.values():
                change.zero_()
        self._keep(0, least)
        return least

    def _judged(self, step: int, least: float) -> float:
        """The least KL of the watched rows so far: of `least`, or of the present changes as they are stored."""
        present = self.student.changes
        self.student.changes = self.ends.changes = {
            name: self.student.tunables[name].rounded(x) for name, x in present.items()
        }
        seen = self._look(step)
        if seen < least:
            self.best, least = self.student.changes, seen
        self.student.changes = self.ends.changes = present
        return least

    def _keep(self, step: int, least: float) -> None:
        """Save the state after `step` steps."""
        if self.saved is None:
            return
        present, adam = self.student.changes, self.adam
        tensors = {"present": present, "best": self.best, "first": adam.first, "second": adam.second}
        seen = {"watched": self.progress.watched, "trained": self.progress.trained}
        self.saved.keep(tensors, {"step": step, "least": least, "rate": self.rate, **seen})

    def _taken_up(self) -> tuple[int, float]:
        """(steps done, least KL) of an interrupted run, whose state this becomes."""
        assert self.begun is not None
        tensors, state = self.begun
        self.student.changes = self.ends.changes = tensors["present"]
        self.best = tensors["best"]
        self.adam = Adam(self.student.changes)
        self.adam.first, self.adam.second = tensors["first"], tensors["second"]
        self.progress.watched = [(int(step), float(kl)) for step, kl in state["watched"]]
        self.progress.trained = state["trained"]
        self.rate = state.get("rate", self.rate)
        return state["step"], state["least"]

    def _look(self, step: int, state: str = "") -> float:
        """Mean KL of the watched rows, of `state`; else of what `step` steps from end to end, or the layers' own steps
        alone, have made.
        """
        states = [self.student.first[r] for r in self.watch]
        for i in range(len(self.student)):
            states = self.student.run(i, states, self.watch)
        total = sum(
            self.ends.divergence(self.student.rows[r], self.wanted[r], x)[0]
            for r, x in zip(self.watch, states, strict=True)
        )
        value = total / self._compared(self.watch)
        if not math.isfinite(value):
            raise NotQuantizable(
                _("tuning, step {step}: the divergence of the watched rows is {value}.", step=step, value=value)
            )
        self.progress.watched.append((step, value))
        if step:
            line = _(
                "tune: step {step} of {steps}, KL {kl:.4f} on rows that are not trained on",
                step=step,
                steps=len(self.schedule),
                kl=value,
            )
        else:
            line = _("tune: {state}, KL {kl:.4f} on rows that are not trained on", state=state or _BY_LAYER, kl=value)
        self.say(line)
        return value

    def _compared(self, rows: list[int]) -> int:
        return sum(self.ends.compared(self.student.rows[r].shape[1]) for r in rows)

    def _forward(self, rows: list[int]) -> list[list[torch.Tensor]]:
        """Inputs of each layer for these rows, then the last one's outputs."""
        states = [[self.student.first[r] for r in rows]]
        for i in range(len(self.student)):
            states.append(self.student.run(i, states[-1], rows))
        return states

    def _step(self, step: int, rows: list[int]) -> None:
        states = self._forward(rows)
        found: dict[str, torch.Tensor] = {}
        tokens = self._compared(rows)
        slopes, total = [], 0.0
        for r, x in zip(rows, states.pop(), strict=True):
            loss, slope = self.ends.divergence(self.student.rows[r], self.wanted[r], x, found)
            assert slope is not None
            total += loss
            slopes.append(slope)
        for i in reversed(range(len(self.student))):
            slopes = self.student.pull_back(i, states.pop(), rows, _given(slopes), found)
        self.progress.trained.append(total / tokens)
        if not math.isfinite(total):
            raise NotQuantizable(
                _(
                    "tuning, rows {rows}: the divergence of the two models is {value}; must be finite.",
                    rows=", ".join(map(str, rows)),
                    value=total,
                ),
                _("`doctor verify` shows where the quantized model leaves the original."),
            )
        rate = self.rate * self._share(step)
        for name, slope in found.items():
            self.adam.step(name, slope.div_(tokens), rate * self.shares[name], step + 1)

    def _share(self, step: int) -> float:
        """Of the rate: a short warm-up, then a cosine down to LAST_SHARE."""
        if step < WARM_UP:
            return (step + 1) / (WARM_UP + 1)
        done = (step - WARM_UP) / max(1, len(self.schedule) - WARM_UP)
        return LAST_SHARE + (1 - LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2


def _given(slopes: list[torch.Tensor]) -> SlopeOf:
    return lambda place, _output: slopes[place]


def _zeros_of(changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(x) for name, x in changes.items()}
