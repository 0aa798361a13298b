"""compressed-tensors, format "float-quantized": 8-bit floats under the weight's own name, activations rounded to them.

| tensor | dtype | shape |
|---|---|---|
| weight | F8_E4M3 | [n, k] |
| weight_scale | BF16 | [n, 1] for rows, [ceil(n/128), ceil(k/128)] for tiles |
| input_scale | BF16 | [1], of the inputs where it was measured beforehand |

group_size -1 is a scale a row, with activations scaled a token at a time; 128 is a scale a tile of 128 × 128, with
activations in groups of 128. Scales are bfloat16 because transformers casts them to the model's dtype as it loads: a
float32 scale would become another one there. fp8.py reads the tensors; here they are written.

Sources: vllm-project/compressed-tensors 0.20 compressors/naive_quantized, quantization/quant_scheme.py (FP8_DYNAMIC,
FP8, FP8_BLOCK); vllm-project/vllm layers/quantization/compressed_tensors/compressed_tensors.py (_is_fp8_w8a8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, contiguous
from doctor.formats.base import Part, Parts, Quantization, Shapes
from doctor.formats.compressed_tensors import CompressedTensors
from doctor.formats.fp8 import unpack_tiles
from doctor.formats.grid import E4M3, Grid, GridKind, as_e4m3, stored_exactly
from doctor.formats.registry import register

TILE = 128
MOST = 448.0  # the largest 8-bit float


class BesideWeight(CompressedTensors):
    """What formats share that keep 8-bit codes under the weight's own name."""

    quant_methods: tuple[str, ...] = ()
    words, scales, zeros, index = "", "weight_scale", "", ""
    part_names: tuple[str, ...] = ("weight", "weight_scale", "input_scale")
    needed: tuple[str, ...] = ("weight", "weight_scale")
    sampled: tuple[str, ...] = ()
    verbatim: tuple[str, ...] = ()
    bits: tuple[int, ...] = (8,)
    groups: tuple[int, ...] = (-1,)
    rows_apart = True
    own_widths = False
    affine = False
    unit = (1, 1)
    stored = "F8_E4M3"

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        return (
            Part("weight", self.stored, (out_features, in_features)),
            Part("weight_scale", "BF16", (out_features, 1)),
        )

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        """Any size has whole rows."""
        return ""

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, k = shapes["weight"]
        return n, k

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        raise self.not_in_words(raw)


@register
class FloatQuantized(BesideWeight):
    """FP8 of vLLM and llm-compressor: FP8_DYNAMIC, FP8_STATIC and FP8_BLOCK. The library's preset of static inputs has
    one scale a weight; vLLM reads a scale a row as well, and then does not round again where it joins q, k and v.
    """

    name = "float-quantized"
    label = "compressed-tensors FP8"
    layout = "float-quantized"
    groups: tuple[int, ...] = (-1, TILE)
    methods: tuple[str, ...] = ("rtn",)
    activations: tuple[str, ...] = ("fp8", "fp8-block", "fp8-static")

    def grid(self, scheme: Scheme) -> GridKind:
        tile = () if scheme.group_size == -1 else (TILE, TILE)
        return GridKind(8, scheme.group_size, True, E4M3, scale_dtype="BF16", tile=tile)

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        rows = (out_features, 1) if scheme.group_size == -1 else (-(-out_features // TILE), -(-in_features // TILE))
        parts = (Part("weight", self.stored, (out_features, in_features)), Part("weight_scale", "BF16", rows))
        return (*parts, Part("input_scale", "BF16", (1,))) if scheme.inputs else parts

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        """Kernels take whole tiles only."""
        if scheme.group_size == -1 or not (in_features % TILE or out_features % TILE):
            return ""
        return _(
            "[{rows}, {columns}]: tiles of {unit} × {unit} need multiples of {unit}",
            rows=out_features,
            columns=in_features,
            unit=TILE,
        )

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        """codes u8[n, k]: bits of 8-bit floats; grid.scale f32[n, G], the same for all rows of a tile."""
        scale = grid.scale if scheme.group_size == -1 else grid.scale[::TILE]
        return {
            "weight": as_e4m3(contiguous(codes)),
            "weight_scale": contiguous(stored_exactly(scale, self.grid(scheme).scale_dtype)),
        }

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        tile = (1, parts["weight"].shape[1]) if scheme.group_size == -1 else (TILE, TILE)
        return unpack_tiles(parts["weight"], parts["weight_scale"], tile, rows)

    def weights(self, recipe: Recipe) -> dict[str, Any]:
        stated = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
        if recipe.group_size == -1:
            return {**stated, "strategy": "channel"}
        return {**stated, "strategy": "block", "block_structure": [TILE, TILE]}

    def input_parts(self, recipe: Recipe, absmax: float) -> dict[str, Array]:
        """The largest input on 448, as bfloat16; 1 for inputs of zeros."""
        if not recipe.scheme.inputs:
            return {}
        import torch

        return {"input_scale": torch.tensor([absmax / MOST if absmax > 0 else 1.0], dtype=torch.bfloat16)}

    def inputs_name(self, recipe: Recipe) -> str:
        return recipe.activations or ("fp8" if recipe.group_size == -1 else "fp8-block")
