"""Runs calibration batches through one decoder layer and suspends them before the linears of each stage.

A batch's forward runs in a coroutine (greenlet) and is suspended in a hook of the stage's first linear. What the
layer has computed so far stays in the local variables of transformers' forward. It resumes there once the stage is
quantized. So a layer costs one forward per batch, whatever its architecture, with exactly the operations of an
uninterrupted one.

A suspended forward keeps a few tensors per token. What exceeds the memory limit is spilled to disk until it resumes
(spill.py). Where that is impossible (a GPU's memory is full, or greenlet is absent) the other batches restart for
every stage, which costs about three forwards per layer. All three ways give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from doctor.quant.forward.expert_modules import Experts
from doctor.quant.forward.held_storages import storage_key, tensors_in
from doctor.quant.forward.hidden_states import HiddenStates
from doctor.quant.forward.layer_call import LayerCall, StopForward
from doctor.quant.forward.linear_groups import Modules, Stages
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.forward.spill import SpillFile
from doctor.quant.forward.stored_linear import StoredLinear
from doctor.quant.forward.suspended import Reached, SuspendedForward, greenlet
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.mapped import Mapped

_DONE = 1 << 30  # a stage behind the last: nothing is collected any more


class StagedForward:
    """Every batch through decoder layer i, stage by stage: `hessians(0)`, `hessians(1)`, …, then `finish`. Use it in
    a `with`.

    stages: groups of names, as `discover` found them. hidden: its items are the layer's inputs; `finish` replaces
    them by the outputs. capacity: bytes that suspended forwards may hold in memory. suspended_bytes: what one holds
    per token. spill_file: where the excess goes; None: forwards that do not fit restart for every stage.
    forgets: experts' weights, once every batch has passed them. square_folder: where Hessians lie in files, None for
    memory. hosted: Hessians of a device lie in the host's memory.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        i: int,
        hidden: HiddenStates,
        calls: list[LayerCall],
        stages: Stages,
        modules: Modules,
        *,
        capacity: float = 0,
        suspended_bytes: float = 0,
        spill_file: SpillFile | None = None,
        forgets: bool = False,
        square_folder: Path | None = None,
        hosted: bool = False,
    ):
        self._layer = skeleton.layers[i]
        self.skeleton, self.modules, self.stages, self.hidden = skeleton, modules, stages, hidden
        self._stage, self._forgets, self._square_folder, self._hosted = -1, forgets, square_folder, hosted
        self._where: dict[nn.Module, tuple[int, int]] = {}
        for number, stage in enumerate(stages):
            for place, group in enumerate(stage):
                self._where[modules[group[0]][1]] = number, place
        self._hessians: list[Hessian] = []
        self._experts = [m for m in self._layer.modules() if isinstance(m, Experts)]
        inside = {m for e in self._experts for m in e.experts.modules()}
        # Groups of a stage that compute one after the other cannot all be had at one stop, unless their experts are
        # our own modules.
        self._at_once = [len(stage) == 1 or all(modules[group[0]][1] in inside for group in stage) for stage in stages]
        self.forwards: list[SuspendedForward] = []
        for number, call in enumerate(calls):
            held = suspended_bytes * hidden.tokens[number]
            resumable = greenlet is not None and all(self._at_once)
            resumable = resumable and (held <= capacity or spill_file is not None)
            capacity -= held if resumable and spill_file is None else 0
            self.forwards.append(
                SuspendedForward(self._computation(i, number, call), resumable, spill_file if resumable else None)
            )
        self._capacity, self._file, self._before = capacity, spill_file, spill_file.end if spill_file else 0
        self._now = self.forwards[0] if self.forwards else None
        self._hooks = [
            m.register_forward_pre_hook(lambda mod, args: self._arrive([(mod, lambda: args[0])]))
            for m in self._where
            if m not in inside
        ]
        for experts in self._experts:
            experts.before = self._arrive

    def _computation(self, i: int, number: int, call: LayerCall) -> Callable[[], torch.Tensor]:
        return lambda: self.skeleton.run_layer(i, self.hidden[number], call)

    def __enter__(self) -> StagedForward:
        return self

    def __exit__(self, *_) -> None:
        for forward in self.forwards:
            forward.close()
        for hook in self._hooks:
            hook.remove()
        for experts in self._experts:
            experts.before = None
        if self._file is not None:
            self._file.release(self._before)

    def _arrive(self, inputs: list[tuple[nn.Module, Callable[[], torch.Tensor]]]) -> None:
        """Called by the layer: these linears are about to compute on these inputs."""
        reached = [(*self._where[m], x) for m, x in inputs if m in self._where]
        if not reached or self._now is None or reached[0][0] < self._stage:
            return
        stage = reached[0][0]
        found = [(place, x) for _, place, x in reached]
        if self._now.resumable:
            self._now.suspend(stage, found)
        elif stage == self._stage:
            self._add(found)
            if self._at_once[stage]:
                raise StopForward

    def _add(self, found: Reached) -> None:
        for place, x in found:
            self._hessians[place].add(x())

    def _kept_by_modules(self) -> set[int]:
        """Storages that outlive a forward because a module of the layer keeps them, such as tables for the lengths it
        met.
        """
        kept = (
            value for module in self._layer.modules() for value in (*vars(module).values(), *module._buffers.values())
        )
        return {storage_key(tensor) for tensor in tensors_in(kept)}

    def hessians(self, stage: int) -> list[Hessian]:
        """The Hessians of the stage's groups, from inputs that see the weights as they are now."""
        self._stage = stage
        self._hessians = [self._hessian(self.modules[group[0]][0].in_features) for group in self.stages[stage]]
        for forward in self.forwards:
            self._now = forward
            if not forward.resumable:
                with suppress(StopForward):
                    forward.output()
                continue
            self._capacity += forward.restore()
            while not forward.finished and forward.stage < stage:
                forward.resume()
            if forward.stage == stage:
                self._add(forward.reached)
                forward.reached = []
            if forward.spill_file is not None:
                self._capacity = forward.spill(self._kept_by_modules, int(self._capacity))
        if self._forgets and all(forward.resumable for forward in self.forwards):
            self._forget_passed(stage)
        found, self._hessians = self._hessians, []
        return found

    def _forget_passed(self, stage: int) -> None:
        """Weights of experts that every batch has passed: they do not compute again in this layer."""
        for name in (name for group in self.stages[stage - 1] for name in group) if stage else ():
            module = self.modules[name][1]
            if isinstance(module, StoredLinear) and module.on_demand:
                module.hold(None)

    def _hessian(self, columns: int) -> Hessian:
        file = Mapped(self._square_folder, columns) if self._square_folder is not None else None
        return Hessian(columns, device=self.skeleton.device, file=file, hosted=self._hosted)

    def finish(self) -> None:
        """Run every forward to its end and replace the layer's inputs by its outputs."""
        self._stage = _DONE
        for number, forward in enumerate(self.forwards):
            self._now = forward
            self.hidden[number] = forward.output()
