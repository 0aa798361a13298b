"""8-bit floats in groups of 32 under a power of two: compressed-tensors' format "mxfp8-quantized".

| tensor | dtype | shape |
|---|---|---|
| weight | F8_E4M3 | [n, k] |
| weight_scale | U8 | [n, k/32], an exponent: the scale is 2^(byte - 127), and 255 is NaN |

Sources: the OCP microscaling formats specification 1.0; vllm-project/compressed-tensors 0.20 compressors/mxfp8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous
from doctor.formats.base import Part, Parts
from doctor.formats.float_quantized import BesideWeight
from doctor.formats.grid import E4M3, Grid, GridKind, as_e4m3
from doctor.formats.mxfp4 import GROUP, exponents, powers
from doctor.formats.registry import register


@register
class MXFP8(BesideWeight):
    """8-bit floats in groups of 32 under a power of two, format "mxfp8-quantized": weight_scale U8 [n, k/32]."""

    name = "mxfp8-quantized"
    label = "compressed-tensors MXFP8"
    layout = "mxfp8-quantized"
    groups: tuple[int, ...] = (GROUP,)
    methods: tuple[str, ...] = ("rtn",)
    activations: tuple[str, ...] = ("mxfp8",)
    unit = (GROUP, 1)
    beside = ("weight_scale",)

    def grid(self, scheme: Scheme) -> GridKind:
        return GridKind(8, scheme.group_size, True, E4M3, scale_dtype="F8_E8M0")

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        return (
            Part("weight", self.stored, (out_features, in_features)),
            Part("weight_scale", "U8", (out_features, in_features // GROUP)),
        )

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        if in_features % GROUP:
            return _("in_features {size} is not a multiple of group_size {group}", size=in_features, group=GROUP)
        return ""

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        scale = tensors.get(f"{info.name}_scale")
        if info.dtype.name != self.stored or scale is None or scale.dtype.name != "U8" or len(info.shape) != 2:
            return None
        return Scheme(8, GROUP)

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        return {"weight": as_e4m3(contiguous(codes)), "weight_scale": exponents(grid.scale)}

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, len(parts["weight"]))
        values, scale = cast(parts["weight"][rows], "F32"), powers(parts["weight_scale"][rows])
        n, k = values.shape
        if tuple(scale.shape) != (n, k // GROUP) or k % GROUP:
            raise BadCheckpoint(
                _(
                    "weight_scale is {found}; groups of {group} of {shape} need {wanted}.",
                    found=list(scale.shape),
                    group=GROUP,
                    shape=[n, k],
                    wanted=[n, k // GROUP],
                )
            )
        return (values.reshape(n, k // GROUP, GROUP) * scale[:, :, None]).reshape(n, k)

    def weights(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "group_size": GROUP,
            "strategy": "group",
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }
