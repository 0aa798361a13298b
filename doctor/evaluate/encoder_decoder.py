"""Models of an encoder and a decoder (T5, BART, Whisper) against their originals, by the decoder's last hidden states.

Such a model is not run layer by layer: the class that config.json names is filled, one checkpoint after the other, in
float32. The first half of a row of text goes into the encoder and the second into the decoder. An encoder that hears
gets noise, the same for both models: what its decoder makes of it means nothing, how far two models are apart does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, NotQuantizable
from doctor.core.messages import _
from doctor.quant.budget import free_memory
from doctor.quant.dequantize import as_float
from doctor.quant.forward.class_names import loaded_into
from doctor.quant.forward.meta_model import build_whole
from doctor.quant.forward.prefetch import load_tensor

KIND = "sequence"
HEARS = "input_features"


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Whether config.json describes a model of an encoder and a decoder."""
    return (checkpoint.value("config.json") or {}).get("is_encoder_decoder") is True


def decoder_states(
    original: Checkpoint,
    quantized: Checkpoint,
    rows: list[torch.Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The decoder's last hidden states f32[tokens, hidden] of both checkpoints of one model, for each of the rows
    int64[1, length]. Raises MachineError where one of them in float32 does not fit into memory, NotQuantizable where a
    parameter of the class has no tensor.
    """
    found = []
    for number, checkpoint in enumerate((original, quantized), 1):
        found.append(_states(checkpoint, rows, device))
        progress(number, 2)
    return list(zip(*found, strict=True))


@torch.no_grad()
def _states(checkpoint: Checkpoint, rows: list[torch.Tensor], device: str) -> list[torch.Tensor]:
    """The decoder's last hidden states f32[tokens, hidden] of each row."""
    view = as_float(checkpoint)
    need, free = 4 * sum(info.numel for info in view.tensors.values()), free_memory()
    if need > free:
        raise MachineError(
            _(
                "{name}: in float32 it takes {need:.1f} GiB, {free:.1f} GiB are free; a model of an encoder and a "
                "decoder is held whole.",
                name=checkpoint.name,
                need=need / 2**30,
                free=free / 2**30,
            ),
            _("Compare it on a machine with more memory."),
        )
    model = _filled(view).to(device)
    draw = torch.Generator().manual_seed(0)
    found = []
    for row in rows:
        given = {name: value.to(device) for name, value in _inputs(model, row, draw).items()}
        states = model(**given, output_hidden_states=True, use_cache=False).decoder_hidden_states[-1]
        found.append(states[0].float().cpu())
    return found


def _inputs(model: Any, row: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """What the class takes of a row int64[1, length], which has two tokens or more."""
    if model.main_input_name == HEARS:
        frames = 2 * model.config.max_source_positions
        noise = torch.randn(1, model.config.num_mel_bins, frames, generator=draw)
        return {
            HEARS: noise,
            "decoder_input_ids": row[:, : getattr(model.config, "max_target_positions", row.shape[1])],
        }
    half = row.shape[1] // 2
    return {"input_ids": row[:, :half], "decoder_input_ids": row[:, half:]}


def _filled(view: Checkpoint) -> Any:
    """The class that config.json names, with the weights of the files in float32 on the CPU."""
    model = build_whole(view, "eager")
    for source, target in loaded_into(model, view.tensors):
        path, _dot, name = target.rpartition(".")
        if target not in model.state_dict():
            continue
        module, value = model.get_submodule(path), load_tensor(view, source, torch.float32)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value
    model.tie_weights()
    _compute_own(model)
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise NotQuantizable(
            _("{model}.{name}: the checkpoint has no tensor for it.", model=type(model).__name__, name=empty),
            _("`doctor check` says which names transformers takes."),
        )
    return model


def _compute_own(model: Any) -> None:
    """Give values to what the class computes and never saves: Marian's sinusoidal positions, M2M-100's buffers."""
    unsaved = set(model._keys_to_ignore_on_save or ())
    for path, module in model.named_modules():
        held = {**module._parameters, **{name: module._buffers[name] for name in module._non_persistent_buffers_set}}
        own = [
            name
            for name, value in held.items()
            if value is not None
            and value.is_meta
            and (name in module._buffers or f"{path}.{name}".removeprefix(".") in unsaved)
        ]
        for name in own:
            value = torch.empty(held[name].shape, dtype=held[name].dtype)
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[name] = value
        if own:
            model._init_weights(module)
