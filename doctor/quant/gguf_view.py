"""A GGUF model as the floating-point checkpoint that transformers computes with: names, rows, norms and config.json.

What `verify` compares is therefore what the file says, metadata included: a wrong permutation or base frequency shows
as a wrong model. Values are decoded tensor by tensor, in float32.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.gguf import GgufTensor
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _, listed
from doctor.formats.ggml_blocks import decode
from doctor.model.gguf_names import ROPE_FREQS, architecture, config_of, unpermuted_rows


class GgufAsFloat:
    """A Checkpoint's reading interface over the one GGUF model of `source`. Raises BadCheckpoint where there are
    several, or where it is broken or of an architecture that is not read.
    """

    def __init__(self, source: Checkpoint):
        self.source = source
        if len(source.gguf) != 1:
            raise BadCheckpoint(
                _(
                    "{root}: holds {n} GGUF models: {names}.",
                    root=str(source.root),
                    n=len(source.gguf),
                    names=listed(model.name for model in source.gguf),
                ),
                _("Give one of the files."),
            )
        self.model = source.gguf[0]
        if not self.model.whole:
            raise BadCheckpoint(
                _("{file}: is broken or not whole.", file=self.model.name), _("Run `doctor check` on it.")
            )
        self.config = config_of(self.model, self._factors())
        known = architecture(self.model.architecture)
        assert known is not None  # config_of() found it
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def _factors(self) -> list[float] | None:
        """What the frequencies of rotations are divided by, None where the file does not scale them so."""
        tensor = self.model.tensors.get(ROPE_FREQS)
        return None if tensor is None else self._decoded(tensor).tolist()

    @cached_property
    def _stored(self) -> dict[str, GgufTensor]:
        """transformers' name -> the tensor in the file. Raises BadCheckpoint for one that has no place in the model."""
        found = {}
        for tensor in self.model.tensors.values():
            name = self._known.name_of(tensor.name)
            if name is None and tensor.name != ROPE_FREQS:
                raise BadCheckpoint(
                    _(
                        "{file}: tensor {name} has no place in {architecture}.",
                        file=self.model.name,
                        name=tensor.name,
                        architecture=self._known.transformers_class,
                    )
                )
            if name is not None:
                found[name] = tensor
        return found

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(name, DTYPES["F32"], t.shape, t.file, t.begin, t.begin + 4 * t.numel)
            for name, t in self._stored.items()
        }

    def value(self, name: str) -> dict | None:
        """config.json, of the metadata; no other document."""
        return self.config if name == "config.json" else None

    def load(self, name: str) -> np.ndarray:
        """float32 values of a tensor, in transformers' order of rows."""
        values = self._decoded(self._stored[name])
        heads = self._known.heads_of(name, self.config["num_attention_heads"], self.config["num_key_value_heads"])
        if heads:
            values = np.ascontiguousarray(unpermuted_rows(values, heads))
        shift = self._known.shift_of(name)
        return values - np.float32(shift) if shift else values

    def _decoded(self, tensor: GgufTensor) -> np.ndarray:
        """float32 values of a tensor, as the file orders them."""
        assert tensor.type is not None  # the model is whole
        raw = np.empty(tensor.nbytes, np.uint8)
        with self.source.open_file(tensor.file) as file:
            file.read_into(tensor.begin, raw.data)
        width = tensor.shape[-1] if tensor.shape else 1
        rows = raw.reshape(max(tensor.numel // width, 1), -1)
        step = max((8 << 20) // max(rows.shape[1], 1), 1)
        values = np.empty(tensor.shape, np.float32)
        flat = values.reshape(-1, width)
        for begin in range(0, len(rows), step):
            flat[begin : begin + step] = decode(rows[begin : begin + step], tensor.type, width)
        return values

    def load_on(self, name: str, device: torch.device | str) -> torch.Tensor | None:
        """The values as a tensor on a device."""
        return torch.from_numpy(self.load(name)).to(device)
