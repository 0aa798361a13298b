"""Calibration rows on their way through one block, halted before the linears of each stage until their new weights
stand.

A batch's forward pass runs in a coroutine (greenlet) that is left in a hook of the stage's first linear: whatever the
block has computed so far stays where transformers keeps it, in the local variables of the pass, and computing goes on
from there once the stage is quantized. So a block costs one forward pass, whatever its architecture, with the very
operations of an uninterrupted one. A halted pass holds a few tensors a token; what the limit leaves no room for lies on
disk until its pass goes on (shelf.py). Where there is no such place (a GPU's memory is full, or greenlet is absent) the
other batches start anew for every stage, which costs about three passes a block. All give the same bytes.

Which linears share an input, and their order, is seen in one pass over one batch, not looked up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doctor.core.records import HessianFacts
from doctor.model.spec import Linear
from doctor.quant.forward.skeleton import Call, Experts, Skeleton, _Enough
from doctor.quant.forward.spill import Shelf
from doctor.quant.solve.hessian import Hessian, spectrum

try:
    from greenlet import GreenletExit, greenlet
except ImportError:
    greenlet = None

WITHOUT_GREENLET = (
    "greenlet is not installed: every stage runs its block from the start, about three times the forward work"
)


@dataclass(frozen=True)
class Stages:
    """Stages of groups of linears (positions in the block's list of linears), and bytes a token that a halted pass
    holds.
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    halted_bytes: float

    def names(self, names: list[str]) -> list[list[list[str]]]:
        return [[[names[k] for k in group] for group in stage] for stage in self.groups]


class Input:
    """The calibration input of one or more linears: H f32[k, k] and what its spectrum says."""

    def __init__(self, hessian: Hessian, damp: float):
        self.H = hessian.take()
        s, bad = spectrum(self.H, hessian.rows, damp), hessian.nonfinite
        self.fact = HessianFacts(
            hessian.rows,
            hessian.columns,
            bad.count if bad else 0,
            (bad.row, bad.channel) if bad else None,
            s.finite,
            s.dead,
            s.mean_diag,
            s.lambda_max,
            s.damp_needed,
            s.condition,
        )


class _Made(TorchDispatchMode):
    """Knows the tensors whose memory was taken inside it and is still held. What was there before is never among
    them.
    """

    def __init__(self):
        super().__init__()
        self._made: dict[int, list[weakref.ref]] = {}  # by storage: the tensors that were seen on it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
        own = {key for key in given if self._alive(key) is not None}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors((out,)):
            key = tensor.untyped_storage()._cdata
            if key in own:
                self._made[key].append(weakref.ref(tensor))
            elif key not in given:
                self._made[key] = [weakref.ref(tensor)]
        return out

    def _alive(self, key: int) -> torch.Tensor | None:
        return next((t for t in (ref() for ref in self._made.get(key, ())) if t is not None), None)

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """Those that live now."""
        found = {key: self._alive(key) for key in self._made}
        self._made = {key: self._made[key] for key, tensor in found.items() if tensor is not None}
        return {key: found[key].untyped_storage() for key in self._made}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among values, lists of them included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def discover(
    skeleton: Skeleton, i: int, hidden: torch.Tensor, call: Call, modules: dict[str, tuple[Linear, torch.nn.Module]]
) -> Stages:
    """One pass of hidden f32[rows, length, hidden] through block i: who reads what, when, and what is held
    meanwhile.
    """
    groups: list[tuple[weakref.ref, list[str]]] = []
    made, most = _Made(), 0

    def arrived(name: str, x: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(storage.nbytes() for storage in made.storages().values()))
        members = next((members for ref, members in groups if ref() is x), None)
        if members is None:
            groups.append((weakref.ref(x), members := []))
        if name not in members:
            members.append(name)

    hooks = [
        m.register_forward_pre_hook(lambda mod, args, name=name: arrived(name, args[0]))
        for name, (_, m) in modules.items()
    ]
    try:
        with made:
            skeleton.run_block(i, hidden, call)
    finally:
        for hook in hooks:
            hook.remove()
    stages = arrange([members for _, members in groups], {n: linear for n, (linear, _) in modules.items()})
    at = {name: k for k, name in enumerate(modules)}
    return Stages(
        tuple(tuple(tuple(at[name] for name in group) for group in stage) for stage in stages),
        most / (hidden.shape[0] * hidden.shape[1]),
    )


def arrange(groups: list[list[str]], linears: dict[str, Linear]) -> list[list[list[str]]]:
    """Groups into stages: each group its own, except that experts' groups of one kind share a stage.

    groups: linears that got the same tensor, in the order of computing. Experts that were not reached are put where
    their likes are; where none was reached, they come last, each linear alone.
    """
    stages: list[tuple[frozenset, list[list[str]]]] = []
    for group in groups:
        kind = frozenset(_kind(linears[name]) for name in group)
        same = next((s for s in stages if s[0] == kind and linears[group[0]].expert is not None), None)
        if same:
            same[1].append(group)
        else:
            stages.append((kind, [group]))
    placed = {name for group in groups for name in group}
    missing: dict[tuple, list[str]] = {}
    for name, linear in linears.items():
        if name not in placed:
            kind = next((k for k, _ in stages if _kind(linear) in k), frozenset({_kind(linear)}))
            missing.setdefault((kind, linear.expert), []).append(name)
    for (kind, _), group in missing.items():
        same = next((s for s in stages if s[0] == kind), None)
        if same:
            same[1].append(group)
        else:
            stages.append((kind, [group]))
    return [groups for _, groups in stages]


def _kind(linear: Linear) -> str:
    """A linear's name without the number of its expert."""
    return linear.name if linear.expert is None else ".*.".join(linear.name.rsplit(f".{linear.expert}.", 1))


class _Pass:
    """One batch on its way. `stage` and `reached` say where it was left; a pass without a coroutine starts anew each
    time.

    shelf: where those of its tensors lie while it is left that have no room in memory; None: all have.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], coroutine: bool, shelf: Shelf | None = None):
        self.stage, self.output = -1, None
        self.reached: list[tuple[Hessian, Callable[[], torch.Tensor]]] = []
        self._compute = compute
        self._body = greenlet(compute) if coroutine else None
        self.shelf, self._made = shelf, _Made() if shelf else nullcontext()
        self._place, self._reserved, self._kept = 0, 0, 0
        self._away: list[tuple[torch.UntypedStorage, int, int]] = []  # storage, its bytes, their place

    @property
    def lasts(self) -> bool:
        """Whether it can be left and taken up again."""
        return self._body is not None

    @property
    def over(self) -> bool:
        return self._body.dead

    def go_on(self) -> None:
        """To where it is left next, or to its end."""
        self.come_back()
        self.reached = []
        with self._made:
            self.output = self._body.switch()

    def leave(self, stage: int, reached: list) -> None:
        """Called inside the pass."""
        self.stage, self.reached = stage, reached
        self._body.parent.switch()

    def put_away(self, stays: Callable[[], set[int]], room: int) -> int:
        """What it holds, to the shelf; but for `room` bytes of it, and the storages stays(), which others hold too. The
        room that is left then.
        """
        if self.over or self._away:
            return room
        without = {}
        for key, storage in self._made.storages().items():
            size = storage.nbytes()
            if size <= room:
                room, self._kept = room - size, self._kept + size
            elif storage.resizable():
                without[key] = storage, size
        kept = stays() if without else ()  # asked for only then: it looks through every expert
        moved = [place for key, place in without.items() if key not in kept]
        size = sum(size for _, size in moved)
        if size > self._reserved:
            self._place, self._reserved = self.shelf.reserve(size), size
        at = self._place
        for storage, size in moved:
            self.shelf.write(at, storage)
            self._away.append((storage, size, at))
            at += size
            storage.resize_(0)
        return room

    def come_back(self) -> int:
        """All that it holds is in memory again; the room that it took there while it was left."""
        away, self._away = self._away, []
        for storage, size, place in away:
            storage.resize_(size)
            self.shelf.read(place, storage)
        kept, self._kept = self._kept, 0
        return kept

    def whole(self) -> torch.Tensor:
        """The block's output."""
        if self._body is None:
            return self._compute()
        while not self.over:
            self.go_on()
        output, self.output = self.output, None
        return output

    def close(self) -> None:
        if self._body is not None and not self.over:
            self._body.throw(GreenletExit)


class Walk:
    """Every batch through block i, stage by stage: `hessians(0)`, `hessians(1)`, …, then `finish`. To be closed by
    `with`.

    stages: of groups of names, as `discover` found them. hidden: its items are the block's inputs, and `finish` puts
    the outputs in their place. room: bytes that halted passes may hold in memory. shelf: where the rest goes; None: the
    passes that have no room start anew.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        i: int,
        hidden,
        calls: list[Call],
        stages: list[list[list[str]]],
        modules: dict[str, tuple[Linear, torch.nn.Module]],
        *,
        room: float = 0,
        halted_bytes: float = 0,
        shelf: Shelf | None = None,
    ):
        self._block = skeleton.blocks[i]
        self.skeleton, self.modules, self.stages, self.hidden = skeleton, modules, stages, hidden
        self._stage, self._taken = -1, False
        self._where: dict[torch.nn.Module, tuple[int, int]] = {}
        for number, stage in enumerate(stages):
            for place, group in enumerate(stage):
                self._where[modules[group[0]][1]] = number, place
        self._hessians: list[Hessian] = []
        experts = [m for m in skeleton.blocks[i].modules() if isinstance(m, Experts)]
        inside = {m for e in experts for m in e.experts.modules()}
        # Groups of a stage that come one after the other cannot all be had at one halt, unless their experts are ours.
        self._at_once = [len(stage) == 1 or all(modules[group[0]][1] in inside for group in stage) for stage in stages]
        self.passes = []
        for number, call in enumerate(calls):
            held = halted_bytes * hidden[number].shape[0] * hidden[number].shape[1]
            lasts = greenlet is not None and all(self._at_once)
            lasts = lasts and (held <= room or shelf is not None)
            room -= held if lasts and shelf is None else 0
            self.passes.append(
                _Pass(lambda n=number, c=call: skeleton.run_block(i, hidden[n], c), lasts, shelf if lasts else None)
            )
        self._room, self._shelf, self._before = room, shelf, shelf.end if shelf else 0
        self._now: _Pass | None = None
        self._experts = experts
        self._hooks = [
            m.register_forward_pre_hook(lambda mod, args: self._arrive([(mod, lambda: args[0])]))
            for m in self._where
            if m not in inside
        ]
        for expert in experts:
            expert.before = self._arrive

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_) -> None:
        for one in self.passes:
            one.close()
        for hook in self._hooks:
            hook.remove()
        for expert in self._experts:
            expert.before = None
        if self._shelf is not None:
            self._shelf.give_back(self._before)

    def _arrive(self, inputs: list[tuple[torch.nn.Module, Callable[[], torch.Tensor]]]) -> None:
        """Called by the block: these linears are about to compute on these inputs."""
        reached = [(*self._where[m], x) for m, x in inputs if m in self._where]
        if not reached or self._stage is None or reached[0][0] < self._stage:
            return
        stage = reached[0][0]
        found = [(place, x) for _, place, x in reached]
        if self._now.lasts:
            self._now.leave(stage, found)
        elif stage == self._stage:
            self._add(found)
            if self._at_once[stage]:
                raise _Enough

    def _add(self, found: list[tuple[int, Callable[[], torch.Tensor]]]) -> None:
        for place, x in found:
            self._hessians[place].add(x())

    def _kept_by_modules(self) -> set[int]:
        """Storages that outlive a pass because a module of the block keeps them: tables that it made for the lengths it
        met.
        """
        kept = (
            value for module in self._block.modules() for value in (*vars(module).values(), *module._buffers.values())
        )
        return {tensor.untyped_storage()._cdata for tensor in _tensors(kept)}

    def hessians(self, stage: int) -> list[Hessian]:
        """The Hessians of the stage's groups, taken with everything before it as it stands now."""
        self._stage = stage
        self._hessians = [
            Hessian(self.modules[group[0]][0].in_features, device=self.skeleton.device) for group in self.stages[stage]
        ]
        for one in self.passes:
            self._now = one
            if not one.lasts:
                try:
                    one.whole()
                except _Enough:
                    pass
                continue
            self._room += one.come_back()
            while not one.over and one.stage < stage:
                one.go_on()
            if one.stage == stage:
                self._add(one.reached)
                one.reached = []
            if one.shelf is not None:
                self._room = one.put_away(self._kept_by_modules, self._room)
        found, self._hessians = self._hessians, []
        return found

    def finish(self) -> None:
        """Every pass to its end; outputs in the place of the inputs."""
        self._stage = None
        for number, one in enumerate(self.passes):
            self._now = one
            self.hidden[number] = one.whole()
