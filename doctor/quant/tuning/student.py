"""The quantized model, one decoder layer at a time, whose scales and gains can be changed and have slopes.

Codes stay as they are stored: a layer's weights are made from its codes and its present scales when it runs, and
forgotten after it. Codes are held as far as `memory` allows; those of the other linears are read anew for each run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import cast

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.formats.grid import neighbours
from doctor.model.spec import build_spec
from doctor.quant.dequantize import Dequantized, as_float, to_torch
from doctor.quant.forward.layer_call import LayerCall
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.tuning.blocks import BlockParts
from doctor.quant.tuning.parameters import Gain, GroupScales, Scales, Tunable, is_norm, offset_of
from doctor.quant.tuning.wanted import LEVEL_BITS, no_scales

SlopeOf = Callable[[int, torch.Tensor], torch.Tensor]
FEW = 32  # tokens of a step
FULL_BITS = 4


@dataclass(frozen=True)
class PackedLinear:
    """A module whose weight is made of codes. name: the linear's, without `.weight`."""

    module: nn.Module
    name: str
    scales: Scales


@dataclass(frozen=True)
class Layer:
    """One decoder layer. rest: (module, name, parameter) of what is not tuned; None where it is read for each run."""

    packed: tuple[PackedLinear, ...]
    gains: tuple[tuple[nn.Module, Gain], ...]
    rest: tuple[tuple[nn.Module, str, nn.Parameter], ...] | None


def tunable(checkpoint: Checkpoint) -> Dequantized | BlockParts:
    """The checkpoint read as floats, where it stores scales that can be tuned. Raises NotQuantizable."""
    if BlockParts.are(checkpoint):
        return BlockParts(checkpoint)
    view = as_float(checkpoint)
    if not isinstance(view, Dequantized):
        raise no_scales(checkpoint)
    if not view.format.affine:
        raise NotQuantizable(
            _(
                "{checkpoint}: {label} does not store one 16-bit scale for each group of integer codes.",
                checkpoint=checkpoint.name,
                label=view.format.label,
            ),
            _("GPTQ, AWQ and compressed-tensors with integers can be tuned."),
        )
    return view


class Student:
    """A quantized checkpoint run over rows of ids int64[1, length].

    memory: bytes for codes, and for what a layer holds besides linears in codes; scales, gains and their changes come
    on top. changes: by tensor name, f32 like the tensor's scales [n, G] or gains [m]; the present state of the tuning.
    Raises NotQuantizable for a format whose scales cannot be tuned, and for layers that hand on more than hidden
    states.
    """

    def __init__(self, checkpoint: Checkpoint, rows: list[torch.Tensor], device: str = "cpu", memory: int = 1 << 62):
        view = tunable(checkpoint)
        self.view, self.memory = view, memory
        self.skeleton = Skeleton(
            cast(Checkpoint, view), build_spec(view.value("config.json") or {}, view.tensors), device
        )
        self.rows = rows
        self.first: list[torch.Tensor] = []  # the input of the first layer, a row each
        self.calls: list[list[LayerCall]] = []
        for hidden, calls in self.skeleton.open_calls(rows):
            if any(call.carried for call in calls):
                raise NotQuantizable(
                    _(
                        "{model}: its layers hand on more than hidden states, which tuning does not follow.",
                        model=type(self.skeleton.model).__name__,
                    )
                )
            self.first.append(hidden)
            self.calls.append(calls)
        self.changes: dict[str, torch.Tensor] = {}
        self.tunables: dict[str, Tunable] = {}
        self._levels: dict[str, torch.Tensor] = {}  # of the linears that memory holds
        self._layers = [self._read(i) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.skeleton.layers)

    def shares(self) -> dict[str, float]:
        """Of the rate, what each tensor's changes take: below FULL_BITS each bit less doubles the errors, and what
        corrects them. Of a norm: by the mean over all linears.
        """
        bits = {name: x.bits for name, x in self.tunables.items() if isinstance(x, Scales)}
        mean = sum(bits.values()) / max(1, len(bits))
        return {name: float(2 ** max(0, FULL_BITS - bits.get(name, mean))) for name in self.tunables}

    def names(self, i: int) -> list[str]:
        """Tensors of layer i that are tuned."""
        layer = self._layers[i]
        return [p.scales.tensor for p in layer.packed] + [gain.tensor for _module, gain in layer.gains]

    def run(self, i: int, states: list[torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
        """Outputs of layer i for hidden states f32[1, length, hidden] of these rows."""
        with torch.no_grad(), self._bound(i, slopes=False):
            return [self._row(i, x, r) for x, r in zip(states, rows, strict=True)]

    def pull_back(
        self, i: int, states: list[torch.Tensor], rows: list[int], slope_of: SlopeOf, found: dict
    ) -> list[torch.Tensor]:
        """Slopes of layer i's inputs, from those of its outputs; those of its changes are added to `found`, but for
        scales of linears that FEW tokens reach, as those of an expert: their slopes are mostly noise. slope_of: from
        the place of a row in `rows` and its output.
        """
        results = []
        packed = [linear.module for linear in self._layers[i].packed]
        with torch.enable_grad(), self._bound(i, slopes=True) as leaves, tokens_of(packed) as tokens:
            for place, (x, r) in enumerate(zip(states, rows, strict=True)):
                x = x.detach().requires_grad_(True)
                output = self._row(i, x, r)
                output.backward(slope_of(place, output.detach()))
                assert x.grad is not None
                results.append(x.grad)
            few = {module for module, count in tokens.items() if count < FEW}
            for (tunable, leaf, levels), module in zip_longest(leaves, packed):
                if leaf.grad is not None and module not in few:
                    add_slope(found, tunable, leaf.grad, levels)
        return results

    def _row(self, i: int, hidden: torch.Tensor, row: int) -> torch.Tensor:
        return self.skeleton.run_layer(i, hidden, self.calls[row][i], carry=False)

    @contextmanager
    def _bound(self, i: int, slopes: bool) -> Iterator[list[tuple[Tunable, torch.Tensor, torch.Tensor | None]]]:
        """Layer i with its weights; yields (what is tuned, the tensor that stands for it, the levels of its codes)."""
        layer = self._layers[i]
        leaves: list[tuple[Tunable, torch.Tensor, torch.Tensor | None]] = []
        modules = [p.module for p in layer.packed] + [module for module, _gain in layer.gains]
        try:
            if layer.rest is None:
                self.skeleton.load_layer(i)
            for module, name, parameter in layer.rest or ():
                module._parameters[name] = parameter
            with torch.no_grad():
                for linear in layer.packed:
                    levels = self._levels_of(linear.name)
                    weight = linear.scales.weight(self.changes[linear.scales.tensor], levels)
                    leaves.append((linear.scales, weight, levels))
                for _module, gain in layer.gains:
                    leaves.append((gain, gain.weight(self.changes[gain.tensor]), None))
            for module, (_tunable, leaf, _levels) in zip(modules, leaves, strict=True):
                put(module, leaf.requires_grad_(slopes))
            yield leaves
        finally:
            for module in modules:
                take_back(module)
            self.skeleton.drop_layer(i)

    def _levels_of(self, linear: str) -> torch.Tensor:
        held = self._levels.get(linear)
        return self._codes(linear)[0] if held is None else held

    def _keep(self, tensors: list[torch.Tensor]) -> bool:
        """Whether memory has room for these tensors; if so, it is taken."""
        size = sum(x.numel() * x.element_size() for x in tensors)
        if size > self.memory:
            return False
        self.memory -= size
        return True

    def _read(self, i: int) -> Layer:
        """Layer i for the first time: its codes must give the weights that engines read."""
        layer = self.skeleton.load_layer(i)
        names = {id(module): tensor for tensor, module in self.skeleton.by_tensor(i).items()}
        linears = {linear.tensor: linear for linear in self.skeleton.linears.get(i, {}).values()}
        packed_tensors = {f"{module}.weight" for module in self.view.modules}
        packed, gains, rest = [], [], []
        for module in layer.modules():
            tensor = names.get(id(module), "")
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if name == "weight" and tensor in packed_tensors and tensor in linears:
                    linear = tensor.removesuffix(".weight")
                    levels, scales = self._codes(linear, linears[tensor].transposed)
                    require_same(tensor, scales, levels, parameter)
                    if self._keep([levels]):
                        self._levels[linear] = levels
                    packed.append(PackedLinear(module, linear, scales))
                    self._tune(scales, scales.scale)
                elif name == "weight" and tensor and is_norm(module):
                    gain = gain_of(self.view, tensor, module)
                    gains.append((module, gain))
                    self._tune(gain, gain.value)
                else:
                    rest.append((module, name, parameter))
        self.skeleton.drop_layer(i)
        held = self._keep([parameter for _module, _name, parameter in rest])
        return Layer(tuple(packed), tuple(gains), tuple(rest) if held else None)

    def _tune(self, tunable: Tunable, like: torch.Tensor) -> None:
        self.changes[tunable.tensor] = torch.zeros_like(like)
        self.tunables[tunable.tensor] = tunable

    def _codes(self, module: str, transposed: bool = False) -> tuple[torch.Tensor, Scales]:
        """(levels [n, k], scales) of a linear, from its stored parts. levels: i8, i16 where a code has 8 bits; those
        of blocks are as BlockScales has them.
        """
        view, device = self.view, self.skeleton.device
        if isinstance(view, BlockParts):
            return view.codes(module, device)
        form, scheme = view.format, view.quantization.scheme_of(module)
        parts = {
            part: to_torch(view.source.load(f"{module}.{part}"), view.source.tensors[f"{module}.{part}"].dtype.name)
            for part in form.part_names
            if f"{module}.{part}" in view.source.tensors
        }
        rows, columns = view.tensors[f"{module}.weight"].shape
        codes, grid, g_idx = form.codes(parts, scheme, (rows, columns))
        groups, group = grid.scale.shape[1], g_idx.long()
        plain = bool((group == neighbours(columns, groups, group).long()).all())
        name = next(f"{module}.{part}" for part in form.scale_names if part in parts)
        scales = GroupScales(
            tensor=name,
            scale=grid.scale.to(device, torch.float32),
            bits=scheme.bits,
            group=None if plain else group.to(device),
            dtype=parts[name.rpartition(".")[2]].dtype,
            columns_first=form.scale_shape(2, 3, 1) == (2, 3),
            transposed=transposed,
        )
        kind = torch.int8 if scheme.bits < LEVEL_BITS else torch.int16
        return (codes.to(kind) - grid.zero.to(kind)[:, group]).to(device), scales


@contextmanager
def tokens_of(modules: list[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """How many tokens each of these modules computes within it; one that is not called is not counted."""
    seen: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: tuple) -> None:
        if args:
            seen[module] += args[0].numel() // max(1, args[0].shape[-1])

    hooks = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def add_slope(
    found: dict[str, torch.Tensor], tunable: Tunable, slope: torch.Tensor, levels: torch.Tensor | None = None
) -> None:
    """Add the slope of a tunable's change, from the slope of its weight, to those found. levels: of a linear."""
    if isinstance(tunable, Gain):
        value = tunable.gradient(slope)
    else:
        assert levels is not None
        value = tunable.gradient(slope, levels)
    found[tunable.tensor] = found[tunable.tensor].add_(value) if tunable.tensor in found else value


def gain_of(view: Dequantized | BlockParts, tensor: str, module: nn.Module) -> Gain:
    """What is tuned of a norm whose weight is loaded."""
    value = module.get_parameter("weight").detach().to(torch.float32)
    dtype = to_torch(view.source.load(tensor), view.source.tensors[tensor].dtype.name).dtype
    return Gain(tensor, value, offset_of(module, value.numel()), dtype)


def put(module: nn.Module, weight: torch.Tensor) -> None:
    """Let a module compute with `weight`; its parameter stays what it is."""
    module.__dict__["weight"] = weight


def take_back(module: nn.Module) -> None:
    module.__dict__.pop("weight", None)


def require_same(name: str, scales: Scales, levels: torch.Tensor, weight: torch.Tensor) -> None:
    """The codes must give the weight that engines read."""
    made = scales.weight(torch.zeros_like(scales.scale), levels).to(weight.device)
    if not torch.allclose(made, weight.to(torch.float32), rtol=1e-5, atol=0):
        raise NotQuantizable(
            _("{tensor}: its codes and scales do not give the weight that is read from it.", tensor=name),
            _("This is an internal error (a bug in doctor): report it."),
        )
