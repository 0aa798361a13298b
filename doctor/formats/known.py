"""What names alone tell of packed weights, of formats that are not read too."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.recipe import Recipe
from doctor.formats.registry import KNOWN, format_of, scale_tails, word_tails

# quant_method of files that hold packed weights which are not read here.
_UNREAD_METHODS = ("awq_marlin", "aqlm", "hqq", "quip", "quark", "vptq", "spqr")
_OTHER_TAILS = (".q_weight", ".trellis")  # EXL2's and EXL3's, whose codes are no words of groups
OTHER_WORDS = ("q_weight", "trellis", "W_q")  # what holds the codes of formats that are named here and not unpacked
# Endings of names of which a packed file of some format has one at least.
_SIGNS = (".weight_scale", ".weight_scale_inv", ".q_weight", ".trellis", ".codes", "_blocks", ".W_q", "_scale")
_SCALES = (".weight_scale_inv", ".weight_scale", ".SCB", ".absmax", ".quant_map", "_blocks", "_scales")
_STATE = re.compile(r"\.quant_state\.bitsandbytes__\w+$")
_UNDOES = (
    ".weight_format",
    ".nested_absmax",
    ".nested_quant_map",
    ".input_scale",
    ".activation_scale",
    ".weight_scale_2",
    ".weight_global_scale",
    ".input_global_scale",
    ".weight_shape",
    ".weight_zero_point",
    ".weight_g_idx",
)

# Formats that are named and not unpacked: the words of a linear -> what no reader can do without, one of each group.
_COMPANIONS = {
    "q_weight": (("q_scale",), ("q_scale_max",), ("q_groups",), ("q_invperm",)),  # q_perm is made of q_invperm
    "trellis": (("suh", "su"), ("svh", "sv")),
    "W_q": (("scale", "zero_scale"), ("zero", "zero_scale")),  # one tensor of both with offload_meta
}
COMPANION_WORDS = tuple(f".{words}" for words in _COMPANIONS)  # endings of the names of such words


def companions_missing(tensors: Container[str], name: str) -> list[str]:
    """Parts that the words `name` of a linear need and that are not beside them, for formats that are named here and
    not unpacked: EXL2, EXL3 and HQQ.
    """
    module, _dot, words = name.rpartition(".")
    return [
        group[0] for group in _COMPANIONS.get(words, ()) if not any(f"{module}.{part}" in tensors for part in group)
    ]


def companion_shapes(tensors: Mapping[str, TensorInfo], name: str) -> list[tuple[str, list[int], list[int]]]:
    """(part, shape found, shape that the words ask for) of parts that do not fit the words `name` of such a linear."""
    module, _dot, words = name.rpartition(".")
    held = {part: tensors[f"{module}.{part}"].shape for part in _SHAPED if f"{module}.{part}" in tensors}
    own, wanted = tensors[name].shape, {}
    if words == "q_weight" and len(own) == 2 and len(held.get("q_scale", ())) == 2:
        groups = held["q_scale"][0]
        wanted = {"q_scale": (groups, own[1] // 8), "q_scale_max": (groups,), "q_groups": (2 * groups,)}
    elif words == "trellis" and len(own) == 3:
        wanted = {"suh": (own[0] * 16,), "svh": (own[1] * 16,)}
    return [(p, list(held[p]), list(shape)) for p, shape in wanted.items() if p in held and held[p] != shape]


_SHAPED = ("q_scale", "q_scale_max", "q_groups", "suh", "svh")


_MLX_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # mode -> (group_size, bits)


def is_mlx_words(info: TensorInfo) -> bool:
    """Whether a tensor holds the words of an MLX linear."""
    return info.dtype.name == "U32" and info.name.endswith(".weight")


def mlx_parts_missing(tensors: Mapping[str, TensorInfo], name: str, stated: Mapping[str, Any]) -> list[str]:
    """Parts that the words `name` of an MLX linear (U32) need and that are not beside it. stated: config.json's
    `quantization`. Its affine mode has a bias for each group, the modes of 4- and 8-bit floats have none.
    """
    module = name.removesuffix(".weight")
    parts = ("scales", "biases") if _of_mlx_module(stated, module).get("mode", "affine") == "affine" else ("scales",)
    return [part for part in parts if f"{module}.{part}" not in tensors]


def mlx_shapes(
    tensors: Mapping[str, TensorInfo], name: str, stated: Mapping[str, Any]
) -> list[tuple[str, list[int], list[int]]]:
    """(part, shape found, shape that the words ask for) of parts that do not fit the words `name` of an MLX linear: one
    scale for each group of columns. mlx python/mlx/nn/layers/quantized.py.
    """
    own = _of_mlx_module(stated, name.removesuffix(".weight"))
    bits, group, shape = own.get("bits"), own.get("group_size"), tensors[name].shape
    if not isinstance(bits, int) or not isinstance(group, int) or bits < 1 or group < 1 or not shape:
        return []
    wanted = (*shape[:-1], shape[-1] * 32 // bits // group)
    held = {p: tensors[n].shape for p in ("scales", "biases") if (n := f"{name.removesuffix('weight')}{p}") in tensors}
    return [(part, list(have), list(wanted)) for part, have in held.items() if have != wanted]


def _of_mlx_module(stated: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What holds for a module. Its own entry takes nothing from the entry for all: what it leaves out is its mode's
    default (mlx python/mlx/nn/layers/quantized.py, quantize).
    """
    own = stated.get(module)
    if not isinstance(own, Mapping):
        return stated
    group, bits = _MLX_DEFAULTS.get(str(own.get("mode", "affine")), (None, None))
    return {
        "group_size": own.get("group_size") or group,
        "bits": own.get("bits") or bits,
        "mode": own.get("mode", "affine"),
    }


def packed_tails() -> tuple[str, ...]:
    """Endings of names of tensors that hold codes instead of weights, of formats that are not read too."""
    return (*word_tails(), *_OTHER_TAILS)


def holds_codes(name: str, dtype: str) -> bool:
    """Whether a tensor of this name and element type holds codes of weights, in words or in bytes."""
    return name.endswith(packed_tails()) or (dtype in ("U8", "I8") and name.endswith((".weight", "_blocks", "_packed")))


def counted_as(name: str, dtype: str) -> str:
    """The element type whose values a tensor holds: bytes under a scale's name are exponents."""
    return "F8_E8M0" if dtype == "U8" and name.endswith((*scale_tails(), "_scales")) else dtype


def packs_fused_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds packed words of all experts of a layer under the name of their fused parameter
    (`experts.gate_up_proj_packed`): what a tool makes that packs parameters and not linears.
    """
    return name.endswith("_packed") and ".experts." in name and len(shape) == 3 and not name.endswith(".weight_packed")


def is_scale_beside_weight(name: str) -> bool:
    """Whether a tensor of this name undoes the packing of narrow weights, in any format that keeps it beside them."""
    return name.endswith(_SCALES) or (".quant_state." in name and _STATE.search(name) is not None)


def quantized(tensors: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    """Those that hold quantized weights, by name and element type."""
    tails = packed_tails()
    for info in tensors:
        narrow = info.dtype.bits < 16 and info.dtype.name != "BOOL" and len(info.shape) >= 2
        if (narrow and info.name.endswith((".weight", "_blocks", "_proj", "_packed"))) or info.name.endswith(tails):
            yield info


def undoes_packing(name: str) -> bool:
    """Whether a tensor of this name is needed to read packed weights beside it; a model without it cannot be read."""
    return name.endswith(_UNDOES) or is_scale_beside_weight(name)


def says_packed(raw: Mapping[str, Any]) -> bool:
    """Whether a quantization_config says that the files hold packed weights."""
    if raw.get("format") == "dense":
        return False
    method = raw.get("quant_method")
    form = next((f for f in KNOWN.values() if method in f.quant_methods), None)
    form = next((f for f in KNOWN.values() if f.claims(raw)), form)
    return form.packs(raw) if form else method in _UNREAD_METHODS


def is_written(raw: Mapping[str, Any] | None) -> bool:
    """Whether a quantization_config is of a format that is written here too."""
    return raw is not None and any(form.writes and form.claims(raw) for form in KNOWN.values())


def shows_packing(name: str) -> bool:
    """Whether a tensor of this name is part of packed weights."""
    return name.endswith((*word_tails(), *_SIGNS))


def streams(recipe: Recipe) -> bool:
    """Whether a recipe's codes are chosen from weights alone and its words from rows alone: then no model is run."""
    return not recipe.calibrated and all(format_of(own).rows_apart for own in recipe.recipes)
