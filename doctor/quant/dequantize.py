"""A quantized checkpoint seen as the floating-point one that engines compute with: packed tensors become `.weight`.

Read as the engine reads it, by what quantization_config says and not by what the words look like: a wrong
checkpoint_format gives the same wrong weights here as there, which is what `verify` must see.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.edits.decoding import decoded
from doctor.edits.gguf_floats import GgufAsFloats
from doctor.formats.base import Format, Quantization
from doctor.formats.registry import read_quantization
from doctor.model.quantization_config import holds_quantized
from doctor.quant import pack  # noqa: F401 - words on a GPU are unpacked by kernels


def quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """quantization_config of config.json, or of quantize_config.json where config.json has none; None for a float
    model.
    """
    config = checkpoint.value("config.json") or {}
    stated = config.get("quantization_config") or checkpoint.value("quantize_config.json")
    return stated if isinstance(stated, dict) else None


def as_float(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself when it holds floats, else a view of it that does. Raises BadCheckpoint for what is not
    read.
    """
    if checkpoint.gguf:
        return GgufAsFloats(checkpoint)
    stated = quantization(checkpoint)
    if stated is None and not holds_quantized(checkpoint):
        return checkpoint
    found = None
    if stated is not None:
        with suppress(Unavailable):
            found = read_quantization(stated, "config.json", "/quantization_config")
    if found is None or not found.format.words:
        return _decoded(checkpoint)
    if not found.readable or found.bits not in found.format.bits:
        raise BadCheckpoint(
            _(
                "config.json: {format} {version} with {bits} bits cannot be read back.",
                format=found.format.name,
                version=found.version,
                bits=found.bits,
            )
        )
    return Dequantized(checkpoint, found)  # type: ignore[return-value] # the same reading interface


def _decoded(checkpoint: Checkpoint) -> Checkpoint:
    """A view of weights under their own names (FP8, bitsandbytes) or of fused experts (MXFP4)."""
    try:
        return decoded(checkpoint)[0]
    except Unavailable as error:
        raise BadCheckpoint(
            _("{root}: its quantized weights cannot be read back: {reason}.", root=checkpoint.name, reason=str(error))
        ) from None


class FloatView:
    """A Checkpoint's reading interface over packed weights: `tensors` and `load` give float32 for quantized linears.
    lent: stored tensors that are in memory already, in whatever dtype, for `load_on` alone.
    """

    def __init__(self, source: Checkpoint):
        self.source = source
        self.lent: Mapping[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def value(self, name: str) -> dict | None:
        """A JSON file's object; config.json without its quantization_config, since what is read here are floats."""
        document = self.source.value(name)
        if name == "config.json" and document is not None:
            return {k: v for k, v in document.items() if k != "quantization_config"}
        return document


class Dequantized(FloatView):
    """A view of a checkpoint whose quantization_config says how its linears are stored."""

    def __init__(self, source: Checkpoint, quantization: Quantization):
        super().__init__(source)
        self.quantization = quantization
        words = "." + self.format.words
        self.modules = sorted(n.removesuffix(words) for n in source.tensors if n.endswith(words))
        own = {f"{module}.{part}" for module in self.modules for part in self.format.part_names}
        self.tensors: dict[str, TensorInfo] = {n: i for n, i in source.tensors.items() if n not in own}
        for module in self.modules:
            first = source.tensors[module + words]
            self.tensors[f"{module}.weight"] = first._replace(
                name=f"{module}.weight", dtype=DTYPES["F32"], shape=self._shape(module)
            )

    @property
    def format(self) -> Format:
        """The format that the linears are stored in."""
        return self.quantization.format

    def _parts(self, module: str) -> list[str]:
        return [part for part in self.format.part_names if f"{module}.{part}" in self.source.tensors]

    def _shape(self, module: str) -> tuple[int, ...]:
        shapes = {part: self.source.tensors[f"{module}.{part}"].shape for part in self._parts(module)}
        return self.format.weight_shape(
            shapes, lambda part: self.source.load(f"{module}.{part}"), self.quantization.bits_of(module)
        )

    def load(self, name: str) -> np.ndarray:
        """Codes of a stored tensor; float32 values of a dequantized weight [out_features, in_features]."""
        values = self.load_on(name, "cpu")
        return self.source.load(name) if values is None else values.numpy()

    def _stored(self, name: str) -> bool:
        return (
            name in self.source.tensors
            or f"{name.removesuffix('.weight')}.{self.format.words}" not in self.source.tensors
        )

    def load_on(self, name: str, device: torch.device | str) -> torch.Tensor | None:
        """f32[out_features, in_features] of a dequantized weight, its words moved to the device before they are
        unpacked; None for a stored tensor that is not lent.
        """
        if name in self.lent:
            return self.lent[name].to(device)
        if self._stored(name):
            return None
        module = name.removesuffix(".weight")
        parts = {part: self._part(f"{module}.{part}").to(device) for part in self._parts(module)}
        missing = [part for part in self.format.needed if part not in parts]
        if missing:
            raise BadCheckpoint(
                _(
                    "{module}: {missing} missing beside {words}.",
                    module=module,
                    missing=", ".join(missing),
                    words=self.format.words,
                )
            )
        return self.format.unpack(parts, self.quantization.scheme_of(module), self.tensors[name].shape)  # type: ignore[arg-type]

    def _part(self, name: str) -> torch.Tensor:
        return to_torch(self.source.load(name), self.source.tensors[name].dtype.name)


def to_torch(codes: np.ndarray, dtype_name: str) -> torch.Tensor:
    """The tensor whose raw codes these are, in its own dtype; shares memory where NumPy allows writing, else copies."""
    if not codes.flags.writeable:
        codes = codes.copy()
    kind = DTYPES[dtype_name].torch
    if kind is None or not hasattr(torch, kind):
        raise BadCheckpoint(
            _("dtype {dtype} has no torch type in torch {version}.", dtype=dtype_name, version=torch.__version__)
        )
    return torch.from_numpy(codes).view(getattr(torch, kind))
