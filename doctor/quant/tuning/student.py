"""The quantized model, one decoder layer at a time, whose scales and gains can be changed and have slopes.

Codes stay as they are stored: a layer's weights are made from its codes and its present scales when it runs, and
forgotten after it. Codes of all layers are held where `memory` allows, and read anew for each run of a layer otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
from doctor.quant.tuning.parameters import Gain, PackedWeight, Tunable, is_norm, offset_of


@dataclass(frozen=True)
class LayerCodes:
    """One decoder layer. tunable: (module, what is tuned of its weight). fixed: (module, name, parameter) of the
    rest.
    """

    tunable: tuple[tuple[nn.Module, Tunable], ...]
    fixed: tuple[tuple[nn.Module, str, nn.Parameter], ...]

    @property
    def nbytes(self) -> int:
        held = [t.levels if isinstance(t, PackedWeight) else t.value for _module, t in self.tunable]
        return sum(x.numel() * x.element_size() for x in [*held, *(p for _module, _name, p in self.fixed)])


class Student:
    """A quantized checkpoint run over rows of ids int64[1, length].

    changes: by tensor name, f32 like the tensor's scales [n, G] or gains [m]; the present state of the tuning.
    Raises NotQuantizable for a format whose scales cannot be tuned, and for layers that hand on more than hidden
    states.
    """

    def __init__(self, checkpoint: Checkpoint, rows: list[torch.Tensor], device: str = "cpu", memory: int = 1 << 62):
        view = as_float(checkpoint)
        if not isinstance(view, Dequantized):
            raise NotQuantizable(
                _("{checkpoint}: holds no packed linears, so there are no scales to tune.", checkpoint=checkpoint.name),
                _("Give the quantized checkpoint first and its original with --to."),
            )
        if not view.format.affine:
            raise NotQuantizable(
                _(
                    "{checkpoint}: {label} does not store one 16-bit scale for each group of integer codes.",
                    checkpoint=checkpoint.name,
                    label=view.format.label,
                ),
                _("GPTQ, AWQ and compressed-tensors with integers can be tuned."),
            )
        self.view, self.memory = view, memory
        self.skeleton = Skeleton(view, build_spec(view.value("config.json") or {}, view.tensors), device)
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
        self._held: dict[int, LayerCodes] = {}
        self._bytes = 0
        for i in range(len(self)):
            self._keep(i, self._read(i))

    def __len__(self) -> int:
        return len(self.skeleton.layers)

    def run(self, i: int, states: list[torch.Tensor], rows: list[int]) -> list[torch.Tensor]:
        """Outputs of layer i for hidden states f32[1, length, hidden] of these rows."""
        with torch.no_grad(), self._bound(i, slopes=False):
            return [self._row(i, x, r) for x, r in zip(states, rows, strict=True)]

    def pull_back(
        self, i: int, states: list[torch.Tensor], rows: list[int], slopes: list[torch.Tensor], found: dict
    ) -> list[torch.Tensor]:
        """Slopes of layer i's inputs, from those of its outputs; those of its changes are added to `found`."""
        results = []
        with torch.enable_grad(), self._bound(i, slopes=True) as leaves:
            for x, r, slope in zip(states, rows, slopes, strict=True):
                x = x.detach().requires_grad_(True)
                self._row(i, x, r).backward(slope)
                assert x.grad is not None
                results.append(x.grad)
            for tunable, leaf in leaves:
                if leaf.grad is not None:
                    add_slope(found, tunable, leaf.grad)
        return results

    def _row(self, i: int, hidden: torch.Tensor, row: int) -> torch.Tensor:
        return self.skeleton.run_layer(i, hidden, self.calls[row][i], carry=False)

    @contextmanager
    def _bound(self, i: int, slopes: bool) -> Iterator[list[tuple[Tunable, torch.Tensor]]]:
        """Layer i with its weights; yields (what is tuned, the tensor that stands for it)."""
        codes = self._held.get(i) or self._read(i)
        leaves = []
        try:
            for module, name, parameter in codes.fixed:
                module._parameters[name] = parameter
            for module, tunable in codes.tunable:
                with torch.no_grad():
                    leaf = tunable.weight(self.changes[tunable.tensor])
                leaf.requires_grad_(slopes)
                put(module, leaf)
                leaves.append((tunable, leaf))
            yield leaves
        finally:
            for module, _tunable in codes.tunable:
                take_back(module)
            self.skeleton.drop_layer(i)

    def _keep(self, i: int, codes: LayerCodes) -> None:
        for _module, tunable in codes.tunable:
            like = tunable.scale if isinstance(tunable, PackedWeight) else tunable.value
            self.changes[tunable.tensor] = torch.zeros_like(like)
            self.tunables[tunable.tensor] = tunable
        self._bytes += codes.nbytes
        if self._bytes <= self.memory:
            self._held[i] = codes

    def _read(self, i: int) -> LayerCodes:
        layer = self.skeleton.load_layer(i)
        names = {id(module): tensor for tensor, module in self.skeleton.by_tensor(i).items()}
        linears = {linear.tensor: linear for linear in self.skeleton.linears.get(i, {}).values()}
        packed = {f"{module}.weight" for module in self.view.modules}
        tunable: list[tuple[nn.Module, Tunable]] = []
        fixed = []
        for module in layer.modules():
            tensor = names.get(id(module), "")
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if name == "weight" and tensor in packed and tensor in linears:
                    codes = self._codes(tensor.removesuffix(".weight"), linears[tensor].transposed)
                    require_same(tensor, codes, parameter)
                    tunable.append((module, codes))
                elif name == "weight" and tensor and is_norm(module):
                    tunable.append((module, gain_of(self.view, tensor, module)))
                else:
                    fixed.append((module, name, parameter))
        self.skeleton.drop_layer(i)
        return LayerCodes(tuple(tunable), tuple(fixed))

    def _codes(self, module: str, transposed: bool) -> PackedWeight:
        view = self.view
        form, scheme = view.format, view.quantization.scheme_of(module)
        parts = {
            part: to_torch(view.source.load(f"{module}.{part}"), view.source.tensors[f"{module}.{part}"].dtype.name)
            for part in form.part_names
            if f"{module}.{part}" in view.source.tensors
        }
        rows, columns = view.tensors[f"{module}.weight"].shape
        codes, grid, g_idx = form.codes(parts, scheme, (rows, columns))
        groups = grid.scale.shape[1]
        group = g_idx.long()
        plain = bool((group == neighbours(codes.shape[1], groups, group).long()).all())
        zero = grid.zero.to(torch.int16)[:, group]
        name = next(f"{module}.{part}" for part in form.scale_names if part in parts)
        return PackedWeight(
            name,
            codes.to(torch.int16) - zero,
            grid.scale.to(torch.float32),
            None if plain else group,
            parts[name.rpartition(".")[2]].dtype,
            form.scale_shape(2, 3, 1) == (2, 3),
            transposed,
        )


def add_slope(found: dict[str, torch.Tensor], tunable: Tunable, slope: torch.Tensor) -> None:
    """Add the slope of a tunable's change, from the slope of its weight, to those found."""
    value = tunable.gradient(slope)
    found[tunable.tensor] = found[tunable.tensor].add_(value) if tunable.tensor in found else value


def gain_of(view: Dequantized, tensor: str, module: nn.Module) -> Gain:
    """What is tuned of a norm whose weight is loaded."""
    value = module.get_parameter("weight").detach().to(torch.float32)
    dtype = to_torch(view.source.load(tensor), view.source.tensors[tensor].dtype.name).dtype
    return Gain(tensor, value, offset_of(module, value.numel()), dtype)


def put(module: nn.Module, weight: torch.Tensor) -> None:
    """Let a module compute with `weight`; its parameter stays what it is."""
    module.__dict__["weight"] = weight


def take_back(module: nn.Module) -> None:
    module.__dict__.pop("weight", None)


def require_same(name: str, codes: PackedWeight, weight: torch.Tensor) -> None:
    """The codes must give the weight that engines read."""
    made = codes.weight(torch.zeros_like(codes.scale)).to(weight.device)
    if not torch.allclose(made, weight.to(torch.float32), rtol=1e-5, atol=0):
        raise NotQuantizable(
            _("{tensor}: its codes and scales do not give the weight that is read from it.", tensor=name),
            _("This is an internal error (a bug in doctor): report it."),
        )
