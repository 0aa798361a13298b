"""MXFP4: 4-bit floats in groups of 32 under a power of two.

| tensor | dtype | shape |
|---|---|---|
| weight_packed | U8 | [n, k/2], two codes a byte, the even column in the low half |
| weight_scale | U8 | [n, k/32], an exponent: the scale is 2^(byte - 127), and 255 is NaN |

gpt-oss stores the experts of a layer in the same codes as `*_blocks` u8[experts, n, k/32, 16] and `*_scales`
u8[experts, n, k/32]; transformers keeps each expert transposed.

Sources: the OCP microscaling formats specification 1.0; vllm-project/compressed-tensors 0.20 compressors/mxfp4;
huggingface/transformers src/transformers/integrations/mxfp4.py (convert_moe_packed_tensors).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import NotQuantizable
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.formats.arrays import Array, cast, is_torch
from doctor.formats.base import Format, Part, Parts, Shapes, Texts
from doctor.formats.e2m1 import packed_halves, scaled
from doctor.formats.grid import Grid
from doctor.formats.nvfp4 import NVFP4Packed
from doctor.formats.registry import register

GROUP = 32
NAN = 255


@register
class MXFP4Packed(NVFP4Packed):
    """compressed-tensors', format "mxfp4-pack-quantized"."""

    name = "mxfp4-pack-quantized"
    label = "compressed-tensors MXFP4"
    part_names = ("weight_packed", "weight_scale")
    needed = ("weight_scale",)
    groups: tuple[int, ...] = (GROUP,)
    activations: tuple[str, ...] = ("mxfp4",)
    unit = (GROUP, 1)
    layout = "mxfp4-pack-quantized"
    group = GROUP
    scale_dtype = "F8_E8M0"
    global_inputs: tuple[str, ...] = ()

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        return (
            Part("weight_packed", "U8", (out_features, in_features // 2)),
            Part("weight_scale", "U8", (out_features, in_features // GROUP)),
        )

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        """codes u8[n, k] in halves (grid.E2M1), grid.scale f32[n, G] of them."""
        return {"weight_packed": packed_halves(codes), "weight_scale": exponents(grid.scale * 2)}

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, parts["weight_packed"].shape[0])
        return scaled(parts["weight_packed"][rows], powers(parts["weight_scale"][rows]), GROUP)


@register
class MXFP4Experts(Format):
    """gpt-oss's, for all experts of a layer: `gate_up_proj_blocks` and `gate_up_proj_scales` are the parameter
    `gate_up_proj` [experts, k, n]. Read only.
    """

    name = "mxfp4"
    label = "MXFP4"
    quant_methods = ("mxfp4",)
    part_names = ("blocks", "scales")
    beside = part_names
    bits = (4,)
    writes = False

    def weight_name(self, codes: str) -> str:
        return codes.removesuffix("_blocks")

    def part_of(self, weight: str, part: str) -> str:
        return f"{weight}_{part}"

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        if not info.name.endswith("_blocks") or info.dtype.name != "U8" or len(info.shape) != 4:
            return None
        scales = tensors.get(self.part_of(self.weight_name(info.name), "scales"))
        fits = scales is not None and scales.shape == info.shape[:3] and info.shape[3] * 2 == GROUP
        return Scheme(4, GROUP) if fits else None

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, ...] | None:
        return _shape_of_experts(info.shape)

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, ...]:
        return _shape_of_experts(shapes["blocks"])

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, ...] | None = None, rows: slice | None = None
    ) -> Array:
        """f32[experts, k, n], or those experts of it."""
        rows = rows or slice(0, parts["blocks"].shape[0])
        return unpack_experts(parts["blocks"][rows], parts["scales"][rows]).swapaxes(1, 2)


def _shape_of_experts(blocks: tuple[int, ...]) -> tuple[int, ...]:
    experts, n, groups, width = blocks
    return experts, groups * width * 2, n


def unpack_experts(blocks: Array, scales: Array) -> Array:
    """f32[experts, n, k] of *_blocks u8[experts, n, k/32, 16] and *_scales u8[experts, n, k/32]."""
    experts, n, groups, width = blocks.shape
    packed = blocks.reshape(experts * n, groups * width)
    return scaled(packed, powers(scales.reshape(experts * n, groups)), width * 2).reshape(experts, n, -1)


def exponents(scale: Array) -> Array:
    """u8 of scales that are powers of two, 2^-127 to 2^127: powers() undoes it. NotQuantizable for another scale."""
    if is_torch(scale):
        fraction, exponent = sys.modules["torch"].frexp(scale)
    else:
        fraction, exponent = np.frexp(scale)
    stored = exponent + 126
    if not ((fraction == 0.5) & (stored >= 0) & (stored < NAN)).all():
        raise NotQuantizable(_("a scale is no power of two: its grid was fitted for another format."))
    return cast(stored, "U8")


def powers(exponents: Array) -> Array:
    """f32 2^(byte - 127) of bytes, NaN for 255."""
    shifted = cast(exponents, "F32") - 127
    if is_torch(exponents):
        return (2.0**shifted).masked_fill(exponents == NAN, float("nan"))
    return np.where(exponents == NAN, np.float32(np.nan), np.exp2(np.minimum(shifted, 127))).astype(np.float32)
