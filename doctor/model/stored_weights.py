"""Quantized weights under their own names: what stores them, and the shape that they have once they are unpacked.

FP8, NVFP4 and bitsandbytes keep codes as `.weight` and scales beside it. Their tensors are narrower than the model's,
or of another shape; whoever compares shapes with config.json asks for `logical_tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import fact, key_of
from doctor.core.recipe import Scheme
from doctor.formats.base import KNOWN, Format
from doctor.model.quantization_config import quantization_of
from doctor.model.spec import build_spec


class StoredWeight(NamedTuple):
    """One quantized weight. lacking: parts beside it that no reader can do without, and that are not there."""

    info: TensorInfo
    format: Format
    scheme: Scheme
    lacking: tuple[str, ...]

    @property
    def module(self) -> str:
        return self.info.name.removesuffix(".weight")


@fact("checkpoint", cost="header")
def stored_weights(checkpoint, tensors) -> dict[str, StoredWeight]:
    """Tensor name -> StoredWeight of every quantized weight that is stored under its own name."""
    block = quantization_of(checkpoint)
    raw = block[0] if block else None
    stating = next((f for f in KNOWN.values() if raw is not None and f.claims(raw)), None)
    found = {}
    for name, info in tensors.items():
        if info.dtype.bits > 8 or info.dtype.name == "BOOL" or not name.endswith(".weight"):
            continue
        for form in KNOWN.values():
            scheme = form.scheme_beside(info, tensors, raw)
            if scheme is not None:
                needed = stating.needed_beside(raw) if stating is not None and raw is not None else ()
                module = name.removesuffix(".weight")
                lacking = tuple(part for part in needed if f"{module}.{part}" not in tensors)
                found[name] = StoredWeight(info, form, scheme, lacking)
                break
    return found


@fact("checkpoint", cost="header")
def logical_tensors(checkpoint, tensors, stored_weights) -> dict[str, TensorInfo]:
    """The tensors with the shapes that weights have once they are unpacked; without the parts that only unpack them."""
    if not stored_weights:
        return tensors
    config = checkpoint.value("config.json") or {}
    plain = build_spec(config, {})
    parts = {f"{w.module}.{part}" for w in stored_weights.values() for part in w.format.beside}
    found = {name: info for name, info in tensors.items() if name not in parts}
    for name, weight in stored_weights.items():
        shape: tuple[int, ...] | None = weight.format.shape_beside(weight.info, {})
        if shape is None:
            shape = plain.expected_shape(name) or ()
            if math.prod(shape) * weight.scheme.bits != weight.info.nbytes * 8:
                del found[name]  # its shape stands among the values
                continue
        found[name] = weight.info._replace(shape=shape)
    return found


STORED_WEIGHTS = key_of(stored_weights)


def lacks(weights: Mapping[str, StoredWeight]) -> dict[tuple[str, ...], list[StoredWeight]]:
    """Weights that lack a part, by what they lack."""
    found: dict[tuple[str, ...], list[StoredWeight]] = {}
    for weight in weights.values():
        if weight.lacking:
            found.setdefault(weight.lacking, []).append(weight)
    return found
