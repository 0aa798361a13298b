"""8-bit integers under a scale for each row or for the tensor: compressed-tensors' "int-quantized".

| tensor | dtype | shape |
|---|---|---|
| weight | I8 | [n, k] |
| weight_scale | BF16, F16 or F32 | [n, 1] or [1] |

weight = code * weight_scale. Activations are quantized too, a token at a time while it serves.

Source: vllm-project/compressed-tensors 0.20 compressors/int_quantized and quantization/quant_scheme.py (W8A8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.recipe import Scheme
from doctor.formats.arrays import Array, cast
from doctor.formats.base import Format, Part, Parts, Shapes
from doctor.formats.registry import register


@register
class INT8(Format):
    """Read only. Its quantization_config is read by compressed-tensors."""

    name = "int8"
    label = "INT8"
    scales = "weight_scale"
    part_names = ("weight", "weight_scale")
    beside = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    needed = ("weight_scale",)
    bits = (8,)
    writes = False

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        return Part("weight", "I8", (out_features, in_features)), Part("weight_scale", "F32", (out_features, 1))

    def claims(self, raw: Mapping[str, Any]) -> bool:
        return False

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        module = info.name.removesuffix(".weight")
        scale = tensors.get(f"{module}.weight_scale")
        whole = scale is not None and (scale.numel == 1 or scale.numel == info.shape[0])
        if info.dtype.name != "I8" or len(info.shape) != 2 or not whole or f"{module}.weight_zero_point" in tensors:
            return None
        return Scheme(8)

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, k = shapes["weight"]
        return n, k

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, parts["weight"].shape[0])
        scale = cast(parts["weight_scale"], "F32").reshape(-1, 1)
        return cast(parts["weight"][rows], "F32") * (scale if len(scale) == 1 else scale[rows])
