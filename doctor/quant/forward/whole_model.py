"""The whole model of a checkpoint that sees or hears: towers and projector in 16 bits, its decoder layers recorded.

The text model alone (skeleton.py) computes from ids. What a decoder layer gets for a row with an image, only the class
that config.json names can tell: it runs the tower, puts its features in the places of the image's tokens, and makes
positions and masks. So that class is built here too, everything but its decoder layers is filled, and its layers are
recorded as the text model's are.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.quant.forward.class_names import loaded_into
from doctor.quant.forward.layer_call import LayerCall, StopForward, shared
from doctor.quant.forward.meta_model import build_whole
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.recorder import record_calls

Inputs = Mapping[str, torch.Tensor]  # what a processor returns for one row, ids among it
IDS = "input_ids"


class WholeModel:
    """The class that config.json names, on the meta device, with the decoder layers that `like` are.

    Raises NotQuantizable where transformers does not define it, or its decoder layers are not found.
    """

    def __init__(self, checkpoint: Checkpoint, like: nn.ModuleList, text_config: Any, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self.model: Any = build_whole(checkpoint, text_config._attn_implementation)
        self.base: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self.layers = _decoder_layers(self.base, like)
        self._before: list[LayerCall] = []  # of the row before: masks and positions that are equal are held once
        self._load()

    @torch.no_grad()
    def calls(self, row: Inputs, values: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[LayerCall]]:
        """(inputs of the first layer dtype[1, length, hidden], each layer's call) for one row. values: how many a layer
        returns in a tuple. Towers compute in float32.
        """
        given = self._given(row)
        name = type(self.model).__name__

        def forward(ids: torch.Tensor) -> None:
            self.base(**given, use_cache=False)

        hidden, calls = record_calls(self.layers, forward, given[IDS], values, name, adds=True)
        calls = [shared(call, self._before[i]) if self._before else call for i, call in enumerate(calls)]
        self._before = calls
        return hidden.to(dtype), calls

    @torch.no_grad()
    def run_towers(self, row: Inputs) -> None:
        """Everything that the model computes of a row before its first decoder layer."""

        def stop(module, args, kwargs):
            raise StopForward

        hook = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.base(**self._given(row), use_cache=False)
        except StopForward:
            pass
        finally:
            hook.remove()

    def _given(self, row: Inputs) -> dict[str, torch.Tensor]:
        """What the class takes of a row."""
        taken = inspect.signature(self.base.forward).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        return {name: self._placed(value) for name, value in row.items() if free or name in taken}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, torch.float32) if value.is_floating_point() else value.to(self.device)

    def _load(self) -> None:
        """Weights of everything but the decoder layers and the head. Raises NotQuantizable where one is not stored as
        the class has it.
        """
        inside = {id(p) for p in self.layers.parameters()}
        stored = dict(loaded_into(self.model, self.checkpoint.tensors))
        sources = {target: source for source, target in stored.items()}
        prefix = next((f"{n}." for n, m in self.model.named_modules() if m is self.base and n), "")
        for path, module in self.base.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is None or id(parameter) in inside:
                    continue
                full = f"{prefix}{path}.{name}" if path else f"{prefix}{name}"
                source = sources.get(full)
                if source is None or self.checkpoint.tensors[source].shape != tuple(parameter.shape):
                    raise NotQuantizable(
                        _(
                            "{model}.{name}: the checkpoint has no tensor of this shape for it, so rows with images "
                            "cannot be computed.",
                            model=type(self.model).__name__,
                            name=full,
                        ),
                        _("Calibrate on text."),
                    )
                loaded = load_tensor(self.checkpoint, source).to(self.device, torch.float32)
                module._parameters[name] = nn.Parameter(loaded, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                source = sources.get(f"{prefix}{path}.{name}" if path else f"{prefix}{name}")
                if source is not None and name not in module._non_persistent_buffers_set:
                    buffer = load_tensor(self.checkpoint, source)
                floating = buffer.is_floating_point()
                module._buffers[name] = buffer.to(self.device, torch.float32 if floating else buffer.dtype)


def _decoder_layers(base: nn.Module, like: nn.ModuleList) -> nn.ModuleList:
    kind, count = type(like[0]), len(like)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and type(module[0]) is kind:
            return module
    raise NotQuantizable(
        _(
            "{model} has no list of {n} {kind}, so rows with images cannot be computed.",
            model=type(base).__name__,
            n=count,
            kind=kind.__name__,
        ),
        _("Calibrate on text."),
    )
