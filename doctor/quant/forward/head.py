"""Loads what turns the last hidden states into logits: the output head, and what a model computes before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.model.spec import ModelSpec
from doctor.quant.forward.parameter_names import ParameterNames
from doctor.quant.forward.prefetch import load_tensor


def load_head(
    model: Any, base: nn.Module, spec: ModelSpec, names: ParameterNames, checkpoint: Checkpoint, like: torch.Tensor
) -> None:
    """Weights of everything outside the base model, in the dtype and on the device of `like`: the head (its own, or the
    embedding's where tied), and BERT's transform before it.

    Raises NotQuantizable where the checkpoint has none, as an embedding model's.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise NotQuantizable(
            _("{model} has no output head, so there are no logits to compare.", model=type(model).__name__)
        )
    source = spec.head_tensor if spec.head_tensor in checkpoint.tensors else spec.embed_tensor
    if source is None:
        raise NotQuantizable(
            _("neither an output head nor an embedding is among the tensors, so there are no logits to compare.")
        )

    def load(name: str) -> nn.Parameter:
        return nn.Parameter(load_tensor(checkpoint, name, like.dtype).to(like.device), requires_grad=False)

    table = _loaded_table(base, like) if source == spec.embed_tensor else None
    head.weight = load(source) if table is None or table.shape != head.weight.shape else table
    bias = source.removesuffix("weight") + "bias"
    if getattr(head, "bias", None) is not None and bias in checkpoint.tensors:
        head.bias = load(bias)
    inside = {id(module) for part in (base, head) for module in part.modules()}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(module) in inside or parameter is None:
                continue
            stored = names.find(f"{path}.{name}" if path else name)
            if stored is None:
                raise NotQuantizable(
                    _(
                        "{model} computes logits with {name}, and the checkpoint has no tensor for it: there "
                        "are none to compare.",
                        model=type(model).__name__,
                        name=f"{path}.{name}",
                    ),
                    _("An embedding model is compared by its embeddings: state its class in config.json."),
                )
            module._parameters[name] = load(stored)


def _loaded_table(base: nn.Module, like: torch.Tensor) -> nn.Parameter | None:
    """The embedding's weight, where it is loaded as `like` is: a tied head is the same matrix, not a second one."""
    get = getattr(base, "get_input_embeddings", None)
    table = getattr(get() if callable(get) else None, "weight", None)
    same = isinstance(table, nn.Parameter) and (table.dtype, table.device) == (like.dtype, like.device)
    return table if same else None
