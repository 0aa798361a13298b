"""compressed-tensors, format "int-quantized": 8-bit integers under the weight's own name, activations rounded to them.

| tensor | dtype | shape |
|---|---|---|
| weight | I8 | [n, k], code - 128 of a symmetric grid |
| weight_scale | BF16 | [n, 1] |

int8.py reads the tensors; here they are written. Scales are bfloat16 for the reason that float_quantized.py gives.

Sources: vllm-project/compressed-tensors 0.20 compressors/naive_quantized, quantization/quant_scheme.py (W8A8).
"""

from __future__ import annotations

from typing import Any

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous
from doctor.formats.base import Parts
from doctor.formats.float_quantized import BesideWeight
from doctor.formats.grid import Grid, GridKind, stored_exactly
from doctor.formats.registry import register

_MIDDLE = 128


@register
class IntQuantized(BesideWeight):
    """INT8 W8A8 of vLLM and llm-compressor."""

    name = "int-quantized"
    label = "compressed-tensors INT8"
    layout = "int-quantized"
    methods: tuple[str, ...] = ("gptq", "rtn")
    activations: tuple[str, ...] = ("int8",)
    stored = "I8"
    smooths = True

    def grid(self, scheme: Scheme) -> GridKind:
        return GridKind(8, -1, True, scale_dtype="BF16")

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        if not (grid.zero == _MIDDLE).all():
            raise NotQuantizable(_("a row has another zero point than {middle}: int8 has none.", middle=_MIDDLE))
        return {
            "weight": cast(cast(codes, "I32") - _MIDDLE, "I8"),
            "weight_scale": contiguous(stored_exactly(grid.scale, "BF16")),
        }

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, len(parts["weight"]))
        return cast(parts["weight"][rows], "F32") * cast(parts["weight_scale"][rows], "F32")

    def weights(self, recipe: Recipe) -> dict[str, Any]:
        stated = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "dynamic": False}
        return {**stated, "strategy": "channel"}

    def inputs_name(self, recipe: Recipe) -> str:
        return "int8"
