"""8-bit floats under a scale for the tensor, for each row or for each tile: DeepSeek's block scales and vLLM's fp8.

| tensor | dtype | shape |
|---|---|---|
| weight | F8_E4M3 | [n, k] |
| weight_scale_inv | F32, BF16 or F8_E8M0 | [ceil(n/rows), ceil(k/columns)]: multiplied with, despite its name |
| weight_scale | F32 or BF16 | [1], [n, 1] or a tile's |

E4M3 has bias 7, no infinities, NaN at 0x7F and 0xFF, and ends at 448. Such files are read; `weight` stands under its
own name, so they have no words that tell them apart, only its element type and the scales beside it.

Sources: the OCP 8-bit floating point specification 1.0; deepseek-ai/DeepSeek-V3 inference/kernel.py (weight_dequant);
vllm-project/vllm vllm/model_executor/layers/quantization/fp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.formats import input_rounding
from doctor.formats.arrays import Array, cast, counted
from doctor.formats.base import Format, Part, Parts, Shapes
from doctor.formats.exclusions import Exclusion, leaves_out
from doctor.formats.input_rounding import InputsOf
from doctor.formats.refusals import Refused, of_fp8
from doctor.formats.registry import register
from doctor.formats.wanted import FLOATS, MAY, ONE, Sizes, Wanted, is_block, tiles

STORED = "F8_E4M3"


@register
class FP8(Format):
    """Read only."""

    name = "fp8"
    label = "FP8"
    quant_methods = ("fp8",)
    whole_names = ("vllm",)
    scales = "weight_scale_inv"
    part_names = ("weight", "weight_scale_inv", "weight_scale")
    beside = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")  # gone with the plain weight
    needed = ("weight_scale_inv",)
    bits = (8,)
    writes = False
    joint = ("scale",)  # one scale a tensor cannot serve two that an engine joins

    @property
    def scale_names(self) -> tuple[str, ...]:
        return "weight_scale_inv", "weight_scale"

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        rows, columns = scheme.tile or (out_features, in_features)
        return (
            Part("weight", STORED, (out_features, in_features)),
            Part("weight_scale_inv", "F32", (-(-out_features // rows), -(-in_features // columns))),
        )

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, k = shapes["weight"]
        return n, k

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        """The tile is quantization_config's weight_block_size; a scale's own shape where there is one for the tensor or
        for each row.
        """
        if info.dtype.name != STORED or len(info.shape) != 2 or not info.name.endswith(".weight"):
            return None
        scales = [name for name in (f"{info.name}_scale_inv", f"{info.name}_scale") if name in tensors]
        if len(scales) != 1:
            return None
        scale = tensors[scales[0]]
        if scale.dtype.name == "U8":  # exponents of groups: MXFP8's
            return None
        tile = () if scale.numel == 1 or scale.shape[-1] == 1 else _stated_tile(raw or {})
        return Scheme(8, tile=tile)

    def stored_bits(self, raw: Mapping[str, Any]) -> int | None:
        return 8

    def needed_beside(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """Scales of activations that were measured beforehand; which scale of the weight there is, `lacking` sees."""
        return ("input_scale",) if raw.get("activation_scheme") == "static" else ()

    def inputs_of(self, raw: Mapping[str, Any]) -> InputsOf | None:
        return input_rounding.of_fp8(raw)

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        return of_fp8(raw)

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        of_size = cache(partial(self._wanted, raw))  # a mixture has thousands of linears and a few sizes
        return lambda module, sizes: of_size(sizes)

    def _wanted(self, raw: Mapping[str, Any], sizes: Sizes | None) -> list[Wanted]:
        block = raw.get("weight_block_size")
        if raw.get("store_dtype"):  # experts in another format than the rest
            return []
        found = [Wanted("weight", (STORED,), (sizes,) if sizes else (), "quant_method fp8")]
        if block is not None and is_block(block):
            shapes = (tiles(sizes, block),) if sizes else ()
            dtypes = (*FLOATS, "F8_E8M0")
            found.append(Wanted("weight_scale_inv", dtypes, shapes, f"weight_block_size {list(block)}"))
        elif block is None:
            found.append(Wanted("weight_scale_inv", (), (*ONE, (1, 1)), "no weight_block_size", MAY))
        if raw.get("activation_scheme") == "static":
            found.append(Wanted("input_scale", FLOATS, ONE, "activation_scheme static"))
        return found

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        excluded = self.excluded(raw)
        return lambda module: not excluded(module)

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """A module, the modules in it, and names that end so: transformers' reading, which includes vLLM's."""
        key = "ignored_layers" if raw.get("ignored_layers") else "modules_to_not_convert"
        entries = raw.get(key)
        return [
            Exclusion.of_words(entry, f"/{key}/{at}", partial(leaves_out, entry))
            for at, entry in enumerate(entries if isinstance(entries, list) else ())
            if isinstance(entry, str) and entry
        ]

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
        return unpack_tiles(parts["weight"], scale, scheme.tile, rows)


def unpack_tiles(weight: Array, scale: Array, tile: tuple[int, ...], rows: slice | None = None) -> Array:
    """f32[n, k], or those rows of it, of 8-bit floats [n, k] under one scale, one a row, or one a tile of (rows,
    columns). Raises BadCheckpoint where the scales are of other tiles.
    """
    scale = cast(scale, "F32")
    n, k = weight.shape
    rows = rows or slice(0, n)
    values = cast(weight[rows], "F32")
    if all(side == 1 for side in scale.shape):
        return values * scale.reshape(())
    scale = scale.reshape(len(scale), -1)
    height, width = tile or (-(-n // scale.shape[0]), -(-k // scale.shape[1]))
    wanted = (-(-n // height), -(-k // width))
    if tuple(scale.shape) != wanted:
        raise BadCheckpoint(
            _(
                "scales {found}; blocks of {height} × {width} of {shape} make {wanted}.",
                found=list(scale.shape),
                height=height,
                width=width,
                shape=[n, k],
                wanted=list(wanted),
            )
        )
    row, column = (counted(n, scale)[rows] // height)[:, None], (counted(k, scale) // width)[None, :]
    return values * scale[row, column]


def _stated_tile(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """(rows, columns) that share a scale, as a quantization_config states them; () where it does not."""
    groups = raw.get("config_groups")
    stated = [raw.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        stated.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for tile in stated:
        if isinstance(tile, (list, tuple)) and len(tile) == 2 and all(type(side) is int and side > 0 for side in tile):
            return tuple(tile)
    return ()
