"""Folds the scales of AWQ or SmoothQuant into the modules of one decoder layer, and takes them back if the layer's
output moves.

Values stored in 16 bits are rounded first and s is derived from them, so the fold is exact for the stored norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from doctor.core.messages import _
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.forward.stored_linear import Give, StoredLinear
from doctor.quant.solve.awq_source import Source, source_of

_WIDE = (torch.float32, torch.float64)  # stored in 16 bits by the output


# (s of the source's channels, how it was found or "") for the weights [n_i, k] of linears that share an input.
Find = Callable[[list[torch.Tensor], Source], tuple[torch.Tensor, str]]


def fold(
    source: Source, s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(s as it comes out, weight, bias) of the source after dividing its output by s; f32, norms exact in `stored`.

    A channel whose new value would be 0 or not finite where the old is neither keeps its factor of 1.
    """
    bias = None if bias is None else (bias / s).to(stored).to(torch.float32)
    if source.kind == "rows":
        return s, weight / s[:, None], bias
    old = weight + 1 if source.kind == "norm+1" else weight
    new = (old / s - 1 if source.kind == "norm+1" else old / s).to(stored).to(torch.float32)
    whole = new + 1 if source.kind == "norm+1" else new
    real = old / whole
    good = torch.isfinite(real) & (real > 0) & torch.isfinite(whole)
    s = torch.where(good, real, torch.ones_like(s))
    return s, torch.where(good, new, weight), bias


@dataclass(frozen=True)
class Folds:
    """Scales s f32 of the channels of `source`, which `module` holds, for the linears of a group."""

    source: Source
    module: nn.Module
    group: tuple[str, ...]
    s: torch.Tensor


class ScaleFolding:
    """Scales of a decoder layer: found on the float layer, folded into its modules, taken back if its output moves."""

    def __init__(
        self,
        modules: dict[str, tuple[Linear, nn.Module]],
        sources: dict[str, nn.Module],
        dtype_of: Callable[[str], torch.dtype],
    ):
        """modules: the linears to quantize, by name; sources: every module of the layer that has a weight, by its
        tensor; dtype_of: the dtype that a tensor is stored in.
        """
        self.modules, self.sources, self.dtype_of = modules, sources, dtype_of
        self.columns: dict[str, torch.Tensor] = {}  # factors f32[k] of each linear's columns, by name
        self.notes: dict[str, str] = {}
        self.norms: set[str] = set()  # tensors of norms that changed: written in the output
        self._before: dict[tuple[nn.Module, str], torch.Tensor | Give] = {}

    def find(self, spec: ModelSpec, group: list[str], find: Find) -> list[Folds]:
        """The scales of linears that share an input, to be folded; none, and a note, where nothing can be folded."""
        linears = [self.modules[name][0] for name in group]
        source, why = source_of(spec, linears, {name: x for name, (x, _module) in self.modules.items()})
        module = self.sources.get(source.tensor) if source else None
        if source is None or module is None:
            self._note(group, _("not scaled: {why}", why=why or _("its norm is not in the decoder layer")))
            return []
        width, channels = linears[0].in_features, _parameter(module, "weight").shape[0]
        if source.kind != "rows" and channels != width:  # one norm for each head: its weight serves all of them
            if width % channels:
                why = _("its norm has {channels} channels for {columns} columns", channels=channels, columns=width)
                self._note(group, _("not scaled: {why}", why=why))
                return []
            source = replace(source, repeat=width // channels, head=channels)
        s, found = find([_rows(*self.modules[name]) for name in group], source)
        if not found:
            self._note(group, _("scales of 1 lose least"))
            return []
        self._note(group, _("scaled by {scale}, folded into {tensor}", scale=found, tensor=source.tensor))
        return [Folds(source, module, tuple(group), s)]

    def fold(self, found: Folds) -> None:
        """Divide the source's output by s and multiply the columns of the group's weights by it."""
        source, module, s = found.source, found.module, found.s
        bias = module._parameters.get("bias")
        if source.kind == "rows":
            flipped = any(x.transposed for x, m in self.modules.values() if m is module)
            self._change(module, lambda W: W / s if flipped else W / s[:, None])
            if bias is not None:
                self._put(module, "bias", (bias / s).to(self._stored(source.tensor)).to(torch.float32))
        else:
            old = module.get_parameter("weight").detach()
            s, weight, moved = fold(source, s, old, bias, self._stored(source.tensor))
            self._put(module, "weight", weight)
            self.norms.add(source.tensor)
            if moved is not None:
                self._put(module, "bias", moved)
        if bias is not None:
            self.norms.add(source.tensor.removesuffix("weight") + "bias")
        columns = source.spread(s)
        for name in found.group:
            linear, target = self.modules[name]
            factors = columns[:, None] if linear.transposed else columns
            self._change(target, partial(torch.mul, factors))
            self.columns[name] = columns

    def take_back(self, why: str) -> None:
        """Restore the layer's weights."""
        for (module, name), value in self._before.items():
            if isinstance(module, StoredLinear) and name == "weight":
                assert not isinstance(value, torch.Tensor)
                module.hold(value)
            else:
                assert isinstance(value, torch.Tensor)
                module.get_parameter(name).data = value
        self._note(self.columns, why)
        self.columns, self.norms = {}, set()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Folded norms and biases in their stored dtype: they replace the checkpoint's in the output."""
        found = {}
        for name in sorted(self.norms):  # a set of strings has another order in every process
            owner, _dot, kind = name.rpartition(".")
            found[name] = self.sources[f"{owner}.weight"].get_parameter(kind).to(self._stored(name))
        return found

    def _stored(self, name: str) -> torch.dtype:
        dtype = self.dtype_of(name)
        return torch.bfloat16 if dtype in _WIDE else dtype

    def _note(self, group: Iterable[str], note: str) -> None:
        self.notes.update(dict.fromkeys(group, note))

    def _change(self, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to the weight: at once, or whenever it is asked for where it is stored elsewhere."""
        if not isinstance(module, StoredLinear):
            self._put(module, "weight", change(module.get_parameter("weight").detach()))
            return
        stored = module.stored if module.give is None else None
        before: Give = module.give or (lambda: stored)  # type: ignore[assignment,return-value]
        self._before.setdefault((module, "weight"), before)
        module.hold(lambda: change(before().to(module.computes)))

    def _put(self, module: nn.Module, name: str, value: torch.Tensor) -> None:
        parameter = module.get_parameter(name)
        self._before.setdefault((module, name), parameter.data)
        parameter.data = value.contiguous()


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter without computing a value for it."""
    found = module._parameters[name]
    assert found is not None
    return found


def _rows(linear: Linear, module: nn.Module) -> torch.Tensor:
    W = module.get_parameter("weight").detach()
    return W.T.contiguous() if linear.transposed else W
