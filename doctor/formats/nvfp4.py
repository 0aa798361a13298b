"""NVFP4: 4-bit floats in groups of 16 under an 8-bit float, and one float32 for the tensor.

| tensor of ModelOpt | of compressed-tensors | dtype | shape |
|---|---|---|---|
| weight | weight_packed | U8 | [n, k/2], two codes a byte, the even column in the low half |
| weight_scale | weight_scale | F8_E4M3 | [n, k/16] |
| weight_scale_2 | weight_global_scale | F32 | [] or [1] |
| input_scale | input_global_scale | F32 | [] or [1]; absent where activations stay in 16 bits |

ModelOpt multiplies: value * (weight_scale * weight_scale_2). compressed-tensors divides: value * (weight_scale /
weight_global_scale). The largest scale of a tensor is 448, the largest E4M3, by construction.

ModelOpt states it in hf_quant_config.json, in config.json, or in both, under other keys: exclude_modules there, ignore
here. An entry excludes modules whose name it is, in whose name it occurs, or that it matches as a shell pattern.

Sources: NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/nvfp4_tensor.py and export/quant_utils.py;
vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py (is_layer_excluded, from_config);
vllm-project/compressed-tensors 0.20 compressors/nvfp4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import NotQuantizable
from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous
from doctor.formats.base import Format, Part, Parts, Quantization, Shapes, Texts
from doctor.formats.compressed_tensors import CompressedTensors, weight_groups
from doctor.formats.e2m1 import packed_halves, scaled
from doctor.formats.exclusions import Exclusion
from doctor.formats.grid import E2M1, Grid, GridKind
from doctor.formats.refusals import Refused, of_modelopt
from doctor.formats.registry import register
from doctor.formats.wanted import FLOATS, ONE, Sizes, Wanted

GROUP = 16
SCALE = "F8_E4M3"


@register
class NVFP4(Format):
    """ModelOpt's, under the weight's own name. It reads ModelOpt's configuration for FP8 too."""

    name = "nvfp4"
    label = "NVFP4"
    quant_methods: tuple[str, ...] = ("modelopt", "modelopt_fp4")
    config_files = ("hf_quant_config.json",)
    scales = "weight_scale"
    part_names: tuple[str, ...] = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    beside = ("weight_scale", "weight_scale_2", "input_scale")
    needed: tuple[str, ...] = ("weight_scale", "weight_scale_2")
    bits: tuple[int, ...] = (4,)
    writes = False
    unit = (GROUP, 1)

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        return (
            Part("weight", "U8", (out_features, in_features // 2)),
            Part("weight_scale", SCALE, (out_features, in_features // GROUP)),
            Part("weight_scale_2", "F32", ()),
            Part("input_scale", "F32", ()),
        )

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, width = shapes["weight"]
        return n, width * 2

    def scale_shape(self, in_features: int, out_features: int, group: int) -> tuple[int, int]:
        return out_features, -(-in_features // group)

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        if info.dtype.name != "U8" or len(info.shape) != 2 or not info.name.endswith(".weight"):
            return None
        own = [tensors.get(f"{info.name}_scale"), tensors.get(f"{info.name}_scale_2")]
        shown = (own[0] is not None and own[0].dtype.name == SCALE) or own[1] is not None
        return Scheme(4, GROUP) if shown or (raw is not None and self.stored_bits(raw) == 4) else None

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, int] | None:
        return info.shape[0], info.shape[1] * 2

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, parts["weight"].shape[0])
        second = cast(parts["weight_scale_2"], "F32").reshape(-1)[0]
        return scaled(parts["weight"][rows], cast(parts["weight_scale"][rows], "F32") * second, GROUP)

    # quantization_config

    def claims(self, raw: Mapping[str, Any]) -> bool:
        return raw.get("quant_method") in self.quant_methods or "quant_algo" in _stated(raw)

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        raise Unavailable(_("{algorithm}: weights under their own name have no words", algorithm=_algorithm(raw)))

    def stored_bits(self, raw: Mapping[str, Any]) -> int | None:
        algorithm = _algorithm(raw)
        return 4 if "NVFP4" in algorithm else 8 if "FP8" in algorithm else None

    def stated_name(self, raw: Mapping[str, Any]) -> str:
        return _algorithm(raw)

    def needed_beside(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        if self.stored_bits(raw) != 4:
            return ()
        return self.needed if _algorithm(raw).startswith("W4A16") else (*self.needed, "input_scale")

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        stated = _stated(raw)
        return of_modelopt(stated, *(("", "ignore") if stated is raw else ("/quantization", "exclude_modules")))

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        """vllm-project/vllm layers/quantization/modelopt.py (QuantKeyScheme and its subclasses)."""
        return lambda module, sizes: self._wanted(_algorithm(raw), sizes)

    def _wanted(self, algorithm: str, sizes: Sizes | None) -> list[Wanted]:
        says, (n, k) = f"quant_algo {algorithm}", sizes or (0, 0)
        if algorithm in ("NVFP4", "W4A16_NVFP4"):
            found = [
                Wanted("weight", ("U8",), ((n, k // 2),) if sizes else (), says),
                Wanted("weight_scale", (SCALE,), ((n, -(-k // GROUP)),) if sizes else (), says),
                Wanted("weight_scale_2", FLOATS, ONE, says),
            ]
        else:
            scales: dict[str, tuple[tuple[int, ...], ...]] = {
                "FP8": ONE,
                "FP8_PER_CHANNEL_PER_TOKEN": ((n,), (n, 1)) if sizes else (),
                "FP8_PB_WO": ((-(-n // 128), 1, -(-k // 128), 1),) if sizes else (),
            }
            if algorithm not in scales:
                return []
            found = [
                Wanted("weight", ("F8_E4M3",), (sizes,) if sizes else (), says),
                Wanted("weight_scale", FLOATS, scales[algorithm], says),
            ]
        return [*found, Wanted("input_scale", FLOATS, ONE, says)] if algorithm in ("FP8", "NVFP4") else found

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        excluded = self.excluded(raw)
        return lambda module: not excluded(module)

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        stated = _stated(raw)
        key = "exclude_modules" if "exclude_modules" in stated else "ignore"
        where = f"/quantization/{key}" if stated is raw.get("quantization") else f"/{key}"
        entries = stated.get(key)
        return [
            Exclusion.of_words(entry, f"{where}/{at}", partial(_leaves_out, entry))
            for at, entry in enumerate(entries if isinstance(entries, list) else ())
            if isinstance(entry, str) and entry
        ]


@register
class NVFP4Packed(CompressedTensors):
    """compressed-tensors', format "nvfp4-pack-quantized"."""

    name = "nvfp4-pack-quantized"
    label = "compressed-tensors NVFP4"
    quant_methods: tuple[str, ...] = ()
    words, scales, zeros, index = "weight_packed", "weight_scale", "", ""
    part_names: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")
    needed: tuple[str, ...] = ("weight_scale", "weight_global_scale")
    sampled: tuple[str, ...] = ()
    verbatim: tuple[str, ...] = ()
    bits: tuple[int, ...] = (4,)
    groups: tuple[int, ...] = (GROUP,)
    methods: tuple[str, ...] = ("gptq", "rtn")
    activations: tuple[str, ...] = ("fp4",)
    rows_apart = True
    own_widths = False
    affine = False
    unit = (GROUP, 1)
    joint = ("bits", "group_size", "sym", "weight_global_scale")
    layout = "nvfp4-pack-quantized"
    group = GROUP
    scale_dtype = SCALE
    global_inputs: tuple[str, ...] = ("input_global_scale",)

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        parts = (
            Part("weight_packed", "U8", (out_features, in_features // 2)),
            Part("weight_scale", SCALE, (out_features, in_features // GROUP)),
            Part("weight_global_scale", "F32", (1,)),
        )
        return (*parts, Part("input_global_scale", "F32", (1,))) if scheme.inputs else parts

    def grid(self, scheme: Scheme) -> GridKind:
        divided = "weight_global_scale" in self.needed
        return GridKind(4, self.group, True, E2M1, scale_dtype=self.scale_dtype, divided=divided)

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        if in_features % self.group:
            return _("in_features {size} is not a multiple of group_size {group}", size=in_features, group=self.group)
        return ""

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        """codes u8[n, k] in halves (grid.E2M1), grid.scale f32[n, G] of them, grid.divisor f32[1]."""
        stored = cast(grid.scale * 2 * grid.divisor, self.scale_dtype)
        if not (cast(stored, "F32") / grid.divisor / 2 == grid.scale).all():
            raise NotQuantizable(_("a scale is no 8-bit float under its divisor: codes were chosen against another."))
        return {
            "weight_packed": packed_halves(codes),
            "weight_scale": contiguous(stored),
            "weight_global_scale": grid.divisor,
        }

    def input_parts(self, recipe: Recipe, absmax: float) -> dict[str, Array]:
        """The divisor that brings the largest scale of the inputs to 448; 1 for inputs of zeros."""
        if not recipe.scheme.inputs:
            return {}
        import torch

        return {"input_global_scale": torch.tensor([448.0 * 6.0 / absmax if absmax > 0 else 1.0])}

    def weights(self, recipe: Recipe) -> dict[str, Any]:
        divided = "weight_global_scale" in self.needed
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": self.group,
            "strategy": "tensor_group" if divided else "group",
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn" if divided else "torch.uint8",
        }

    def size(self, words: tuple[int, ...], bits: int, version: str = "") -> tuple[int, int]:
        return words[1] * 2, words[0]

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, width = shapes[self.words]
        return n, width * 2

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        rows = rows or slice(0, parts["weight_packed"].shape[0])
        divisor = cast(parts["weight_global_scale"], "F32").reshape(-1)[0]
        return scaled(parts["weight_packed"][rows], cast(parts["weight_scale"][rows], "F32") / divisor, GROUP)

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        groups = weight_groups(raw)
        quantized = any(isinstance(group.get("input_activations"), Mapping) for group in groups)
        return Quantization(
            self,
            self,
            Scheme(4, self.group),
            False,
            self.layout,
            dict(raw),
            file,
            pointer,
            also_needed=self.global_inputs if quantized else (),
        )


def _leaves_out(entry: str, module: str) -> bool:
    return entry in module or fnmatchcase(module, entry)


def _stated(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where quant_algo stands: in hf_quant_config.json's "quantization", else in the block itself."""
    inner = raw.get("quantization")
    return inner if isinstance(inner, Mapping) else raw


def _algorithm(raw: Mapping[str, Any]) -> str:
    return str(_stated(raw).get("quant_algo") or "").upper()
