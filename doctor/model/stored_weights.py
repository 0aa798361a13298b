"""Quantized weights under their own names: what stores them, and the shape that they have once they are unpacked.

FP8, NVFP4 and bitsandbytes keep codes as `.weight` and scales beside it. Their tensors are narrower than the model's,
or of another shape; whoever compares shapes with config.json asks for `logical_tensors`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import fact, key_of
from doctor.core.recipe import Scheme
from doctor.formats.base import Format
from doctor.formats.registry import KNOWN
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
    found, bare = {}, []
    for name, info in tensors.items():
        if info.dtype.bits > 8 or info.dtype.name == "BOOL" or not name.endswith(".weight"):
            continue
        form, scheme = _form_beside(info, tensors, raw)
        if form is None or scheme is None:
            bare.append(info)
            continue
        needed = stating.needed_beside(raw) if stating is not None and raw is not None else ()
        module = name.removesuffix(".weight")
        lacking = tuple(part for part in needed if f"{module}.{part}" not in tensors)
        found[name] = StoredWeight(info, form, scheme, lacking)
    if stating is not None and raw is not None and found:
        found |= _without_scale(bare, found, stating.takes(raw), tensors)
    return found


def _form_beside(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: dict | None
) -> tuple[Format | None, Scheme | None]:
    pairs = ((form, form.scheme_beside(info, tensors, raw)) for form in KNOWN.values())
    return next((pair for pair in pairs if pair[1] is not None), (None, None))


def _without_scale(
    bare: list[TensorInfo],
    others: Mapping[str, StoredWeight],
    taken: Callable[[str], bool] | None,
    tensors: Mapping[str, TensorInfo],
) -> dict[str, StoredWeight]:
    """Weights of the others' element type that readers take as quantized, and that have none of the others' scales."""
    like = next(iter(others.values()))
    scales = Counter(part for w in others.values() for part in w.format.scale_names if f"{w.module}.{part}" in tensors)
    if taken is None or not scales:
        return {}
    part = scales.most_common(1)[0][0]
    same = [i for i in bare if i.dtype == like.info.dtype and len(i.shape) == 2]
    return {
        info.name: StoredWeight(info, like.format, like.scheme, (part,))
        for info in same
        if taken(info.name.removesuffix(".weight"))
    }


@fact("checkpoint", cost="header")
def logical_tensors(checkpoint, tensors, stored_weights) -> dict[str, TensorInfo]:
    """The tensors with the shapes that weights have once they are unpacked; without the parts that only unpack them."""
    tensors = _with_fused_experts(tensors)
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


def _with_fused_experts(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The tensors with fused experts that are stored in codes (gpt-oss in MXFP4) under the parameter's own name."""
    found: dict[str, TensorInfo] = {}
    parts: set[str] = set()
    for name, info in tensors.items():
        if len(info.shape) != 4 or info.dtype.bits > 8:
            continue
        form, _scheme = _form_beside(info, tensors, None)
        shape = form.shape_beside(info, {}) if form is not None else None
        if form is not None and shape is not None:
            weight = form.weight_name(name)
            found[weight] = info._replace(name=weight, shape=shape)
            parts |= {form.part_of(weight, part) for part in form.beside}
    return {**{n: i for n, i in tensors.items() if n not in parts}, **found} if found else tensors


STORED_WEIGHTS = key_of(stored_weights)


def lacks(weights: Mapping[str, StoredWeight]) -> dict[tuple[str, ...], list[StoredWeight]]:
    """Weights that lack a part, by what they lack."""
    found: dict[tuple[str, ...], list[StoredWeight]] = {}
    for weight in weights.values():
        if weight.lacking:
            found.setdefault(weight.lacking, []).append(weight)
    return found
