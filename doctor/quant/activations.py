"""The calibration batches between two decoder layers: hidden states, each layer's arguments, and the memory they may
take.
"""

from __future__ import annotations

import math
import re

import torch

from doctor.core.messages import _
from doctor.quant import budget
from doctor.quant.forward.hidden_states import HiddenStates, batch_shape
from doctor.quant.forward.layer_call import LayerCall
from doctor.quant.forward.linear_groups import LinearGroups, Modules, Stages, discover, in_turn
from doctor.quant.forward.spill import SpillFile
from doctor.quant.forward.staged import StagedForward
from doctor.quant.setup import Setup

_SHARE_OF_DEVICE = 0.8  # of a GPU's free memory for suspended forwards, after one layer and the Hessians


class Activations:
    """Where every batch is, layer by layer. Made by `open_activations`; a layer's forward moves it on."""

    def __init__(
        self,
        setup: Setup,
        hidden: HiddenStates,
        calls: list[list[LayerCall]],
        capacity: int,
        spill_file: SpillFile | None,
    ):
        self.setup, self.hidden, self.calls = setup, hidden, calls
        self._capacity, self._file = capacity, spill_file
        self._structures: dict[tuple, LinearGroups] = {}
        self._said = False  # whether a progress line has said that forwards are spilled

    def linear_groups(self, i: int, modules: Modules) -> LinearGroups:
        """Groups of layer i's linears; found once for all layers of one structure."""
        skeleton = self.setup.skeleton
        key = (
            skeleton.kind_of(i),
            *(re.sub(rf"\.{i}\.", ".#.", name, count=1) for name in modules),
            *((x.in_features, x.out_features) for x, _ in modules.values()),
        )
        if key not in self._structures:
            # The longest batch: how much a suspended forward holds may grow with the square of the length.
            run = [number for number, calls in enumerate(self.calls) if not calls[i].idle]
            last = run[-1] if run else len(self.calls) - 1
            found = discover(skeleton, i, self.hidden[last], self.calls[last][i], modules, self.hidden.tokens[last])
            # experts that one rank's rows reach may be missing in another's
            groups, held = self.setup.ranks.broadcast_json(0, [found.groups, found.suspended_bytes])
            self._structures[key] = LinearGroups(tuple(tuple(map(tuple, stage)) for stage in groups), held)
        return self._structures[key]

    def stages(self, i: int, modules: Modules, groups: LinearGroups) -> Stages:
        """Stages of layer i by name, with as many experts at a time as the skeleton takes."""
        found = {name for name, (_linear, module) in modules.items() if module in self.setup.skeleton.experts_of(i)}
        linears = {name: linear for name, (linear, _module) in modules.items()}
        return in_turn(groups.names(list(modules)), linears, found, self.setup.skeleton.experts_at_once)

    def staged_forward(
        self, i: int, stages: Stages, modules: Modules, suspended_bytes: float, *, forgets: bool = False
    ) -> StagedForward:
        """A forward of layer i that stops before each stage. forgets: see StagedForward."""
        setup = self.setup
        capacity, calls = self.device_capacity(), [calls[i] for calls in self.calls]
        tokens = sum(batch.numel() for batch in setup.batches)
        if self.hidden.on_disk:  # then a suspended forward holds its input too
            suspended_bytes += self.hidden.nbytes / tokens
        held = suspended_bytes * tokens
        spill_file = None
        if capacity < held < math.inf and setup.skeleton.device.type == "cpu":
            spill_file = self._file = self._file or SpillFile(setup.output.stage)
            self._say_spilled(held, capacity)
        return StagedForward(
            setup.skeleton,
            i,
            self.hidden,
            calls,
            stages,
            modules,
            capacity=capacity,
            suspended_bytes=suspended_bytes,
            spill_file=spill_file,
            forgets=forgets,
            square_folder=setup.output.stage if setup.need.squares_on_disk else None,
            hosted=setup.need.hosted,
        )

    def _say_spilled(self, held: float, capacity: int) -> None:
        if not self._said:
            self._said = True
            self.setup.progress(
                _(
                    "suspended forwards hold {held:.2f} GiB, more than {limit:.2f} GiB: the rest is spilled to "
                    "disk, in {path}",
                    held=held / 2**30,
                    limit=capacity / 2**30,
                    path=str(self.setup.output.stage),
                )
            )

    def device_capacity(self) -> int:
        """Bytes for suspended forwards, where they are computed."""
        return _capacity(self.setup, self._capacity)

    def run_first(self, i: int) -> torch.Tensor:
        """The output of layer i for the first batch, as its weights are now."""
        return self.setup.skeleton.run_layer(i, self.hidden[0], self.calls[0][i], carry=False)

    def advance(self, i: int) -> None:
        """Replace the inputs of layer i, whose weights are final, by its outputs."""
        for number, calls in enumerate(self.calls):
            self.hidden[number] = self.setup.skeleton.run_layer(i, self.hidden[number], calls[i])


def open_activations(setup: Setup) -> Activations | None:
    """The inputs of the first decoder layer; None where the method takes no calibration rows."""
    if not setup.batches:
        return None
    left = budget.left(setup.need, setup.memory)
    files: list[SpillFile] = []

    def spill_file() -> SpillFile:
        files.append(SpillFile(setup.output.stage))
        return files[0]

    opened = setup.skeleton.open_calls(setup.batches, setup.seen)
    first, calls = next(opened)
    hidden = HiddenStates(
        [batch_shape(first, setup.batches[0], ids) for ids in setup.batches],
        [ids.numel() for ids in setup.batches],
        left,
        spill_file,
        setup.skeleton.device,
        setup.skeleton.dtype,
        _capacity(setup, 0) // 2,
    )
    if hidden.on_disk:
        setup.progress(
            _(
                "hidden states take {size:.2f} GiB, more than {limit:.2f} GiB: kept on disk, in {path}",
                size=hidden.nbytes / 2**30,
                limit=left / 2**30,
                path=str(setup.output.stage),
            )
        )
    hidden[0] = first
    del first
    found = [calls]
    for number, (inputs, calls) in enumerate(opened, 1):
        hidden[number] = inputs
        found.append(calls)
    capacity = left - (0 if hidden.on_disk or hidden.on_device else hidden.nbytes)
    return Activations(setup, hidden, found, capacity, files[0] if files else None)


def _capacity(setup: Setup, in_memory: int) -> int:
    """`in_memory` on a CPU; on a GPU a share of what is free there."""
    if setup.skeleton.device.type != "cuda":
        return in_memory
    free = torch.cuda.mem_get_info(setup.skeleton.device)[0]
    return int(_SHARE_OF_DEVICE * max(0, free - setup.need.solving_on_device))
