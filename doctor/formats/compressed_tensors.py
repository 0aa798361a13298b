"""compressed-tensors, format "pack-quantized": words along in_features, not transposed.

| tensor | dtype | shape |
|---|---|---|
| weight_packed | I32 | [n, ceil(k*b/32)], packed along k |
| weight_scale | F16 | [n, G] |
| weight_shape | I64 | [2], (n, k) |
| weight_zero_point | I32 | [ceil(n*b/32), G], packed along n; only where symmetric is false |
| weight_g_idx | I32 | [k], only with actorder "group", which 0.20 refuses |

Stored codes are offset binary, signed + 2^(b-1), which is what an affine grid's codes are already. Codes cross words
since 0.18; before, a word held floor(32/b) codes, which differs for 3 bits and is told by the width of a row.

Source: vllm-project/compressed-tensors 0.20.0 and 0.15.0 src/compressed_tensors/compressors/pack_quantized,
src/compressed_tensors/utils/match.py (names, and patterns after "re:").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.facts import Unavailable
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.methods import GRID_BITS
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous, full, is_torch
from doctor.formats.base import Format, Part, Parts, Quantization, Shapes
from doctor.formats.bits import (
    kernels_for,
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
    unpack_whole_fields,
    words_of,
)
from doctor.formats.exclusions import Exclusion
from doctor.formats.grid import Grid, dequantize, neighbours, stored_exactly
from doctor.formats.input_rounding import OTHER_CLASS, InputsOf, of_groups
from doctor.formats.refusals import Refused, of_compressed_tensors
from doctor.formats.registry import KNOWN, register
from doctor.formats.requirements import require_dividing, require_groups, require_shape, whole
from doctor.formats.wanted import Sizes, Wanted, group_of, of_group, targets_of
from doctor.formats.widths import Widths, exactly

# How a linear's inputs are rounded while it serves, as its keys say it: name -> keys that differ from the usual.
_INPUTS: dict[str, dict[str, Any]] = {
    "int8": {"type": "int", "strategy": "token"},
    "fp8": {"type": "float", "strategy": "token"},
    "fp8-static": {"type": "float", "strategy": "tensor", "dynamic": False, "observer": "static_minmax"},
    "fp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
        "observer": "static_minmax",
    },
    "fp8-block": {"type": "float", "strategy": "group", "group_size": 128},
    "mxfp8": {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}


@register
class CompressedTensors(Format):
    """The integers of compressed-tensors."""

    name = "compressed-tensors"
    label = "compressed-tensors"
    quant_methods: tuple[str, ...] = ("compressed-tensors",)
    groups_of_modules = True
    agreed = ("format", "config_groups")
    words, scales, zeros, index = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
    part_names: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
    needed: tuple[str, ...] = ("weight_scale",)
    sampled: tuple[str, ...] = ("weight_g_idx", "weight_zero_point")
    verbatim: tuple[str, ...] = ("weight_shape",)
    bits: tuple[int, ...] = GRID_BITS
    libraries = ("compressed-tensors",)
    affine = True
    signed_below = 4
    activations: tuple[str, ...] = ("fp8",)
    kv_caches = ("fp8", "fp8-head")
    separates_gate_and_up = True
    packs_heads = ("transformers",)
    layout = "pack-quantized"  # what quantization_config calls it

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        groups = 1 if scheme.group_size == -1 else -(-in_features // scheme.group_size)
        parts = (
            Part("weight_packed", "I32", (out_features, words_of(in_features, scheme.bits))),
            Part("weight_scale", "F16", (out_features, groups)),
            Part("weight_shape", "I64", (2,)),
        )
        if scheme.sym:
            return parts
        return (*parts, Part("weight_zero_point", "I32", (words_of(out_features, scheme.bits), groups)))

    def size(self, words: tuple[int, ...], bits: int, version: str = "") -> tuple[int, int]:
        return words[1] * 32 // bits, words[0]

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        n, k = (int(side) for side in load("weight_shape"))
        return n, k

    def scale_shape(self, in_features: int, out_features: int, group: int) -> tuple[int, int]:
        return out_features, -(-in_features // group)

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        """Groups of neighbours: g_idx is not stored."""
        _require_bits(scheme.bits)
        packed = {
            "weight_packed": pack_rows(codes, scheme.bits),
            "weight_scale": contiguous(stored_exactly(grid.scale, self.grid(scheme).scale_dtype)),
            "weight_shape": _sides(codes),
        }
        middle = 2 ** (scheme.bits - 1)
        if not scheme.sym:
            packed["weight_zero_point"] = pack_columns(grid.zero, scheme.bits)
        elif not (grid.zero == middle).all():
            raise NotQuantizable(
                _(
                    "a symmetric compressed-tensors weight has no zero points, and a group has {least}..{most}: all "
                    "must be {middle}.",
                    least=int(grid.zero.min()),
                    most=int(grid.zero.max()),
                    middle=middle,
                ),
                _("Write it as symmetric=false."),
            )
        return packed

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        words, bits = parts["weight_packed"], scheme.bits
        n, k = shape or _stored_sides(parts)
        kernels = kernels_for(words) if rows is None and words.shape[1] == words_of(k, bits) else None
        if kernels is not None:
            self._fitting(parts, n, k, bits)
            optional = {
                name: contiguous(parts[name]) for name in ("weight_zero_point", "weight_g_idx") if name in parts
            }
            return kernels.compressed_dequantize(
                contiguous(words), contiguous(parts["weight_scale"]), (n, k), bits, **optional
            )
        return dequantize(*self.codes(parts, scheme, (n, k), rows))

    def codes(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> tuple[Array, Grid, Array]:
        """(codes u8[n, k], grid, g_idx i32[k]) of a weight of [n, k] = shape, or of those rows of it."""
        n, k = shape or _stored_sides(parts)
        bits = scheme.bits
        g_idx = self._fitting(parts, n, k, bits)
        rows = rows or slice(0, n)
        words, scale = parts["weight_packed"][rows], cast(parts["weight_scale"][rows], "F32")
        per_word, width = 32 // bits, words.shape[1]
        if width == words_of(k, bits):
            codes = unpack_rows(words, bits, k)
        elif width == -(-k // per_word):
            codes = unpack_whole_fields(words, bits, k)
        else:
            raise BadCheckpoint(
                _(
                    "weight_packed has {width} words a row for {size} codes of {bits} bits: a dense stream has "
                    "{dense}, the layout before compressed-tensors 0.18 {older}.",
                    width=width,
                    size=k,
                    bits=bits,
                    dense=words_of(k, bits),
                    older=-(-k // per_word),
                )
            )
        stored = parts.get("weight_zero_point")
        if stored is None:
            zero = full(tuple(scale.shape), 2 ** (bits - 1), "I32", scale)
        else:
            zero = cast(unpack_columns(stored, bits, n)[rows], "I32")
        return codes, Grid(scale, zero), g_idx

    def _fitting(self, parts: Parts, n: int, k: int, bits: int) -> Array:
        """g_idx i32[k] of a weight whose other tensors fit each other."""
        _require_bits(bits)
        scale, zero, g_idx = (parts.get(name) for name in ("weight_scale", "weight_zero_point", "weight_g_idx"))
        if scale is None:
            raise KeyError("weight_scale")
        groups = scale.shape[1]
        require_shape("weight_scale", scale, (n, groups))
        if zero is not None:
            require_shape("weight_zero_point", zero, (words_of(n, bits), groups))
        if g_idx is None:
            require_dividing(k, groups)
            g_idx = neighbours(k, groups, scale)
        require_groups(g_idx, k, groups)
        return cast(g_idx, "I32")

    def claims(self, raw: Mapping[str, Any]) -> bool:
        """The class that writes its layout; integers and what nobody writes are this one's."""
        if raw.get("quant_method") not in CompressedTensors.quant_methods:
            return False
        if type(self) is not CompressedTensors:
            return raw.get("format") == self.layout
        others = (form for form in KNOWN.values() if isinstance(form, CompressedTensors) and form is not self)
        return all(raw.get("format") != form.layout for form in others)

    def packs(self, raw: Mapping[str, Any]) -> bool:
        """Without groups it describes a cache or nothing."""
        return bool(raw.get("config_groups"))

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        widths = widths or {}
        weights = self.weights(recipe)
        common: dict[str, Any] = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": self.inputs(recipe),
            "output_activations": None,
            "format": self.layout,
        }
        groups = {"group_0": common}
        for number, bits in enumerate(sorted(set(widths.values())), 1):
            targets = sorted(name for name, own in widths.items() if own == bits)
            groups[f"group_{number}"] = {**common, "targets": targets, "weights": {**weights, "num_bits": bits}}
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": _cache_scheme(recipe.kv_cache),
            "ignore": ["lm_head", *sorted(kept)],
            "config_groups": groups,
        }

    def weights(self, recipe: Recipe) -> dict[str, Any]:
        """The weights of a config group, as QuantizationArgs has them."""
        return {
            "num_bits": recipe.bits,
            "type": "int",
            "symmetric": recipe.sym,
            "strategy": "channel" if recipe.group_size == -1 else "group",
            "group_size": None if recipe.group_size == -1 else recipe.group_size,
            "dynamic": False,
            "actorder": None,
            "observer": "minmax",
        }

    def inputs(self, recipe: Recipe) -> dict[str, Any] | None:
        """The input activations of a config group; None where they stay in 16 bits."""
        name = self.inputs_name(recipe)
        if not name:
            return None
        usual = {"num_bits": 8, "symmetric": True, "group_size": None, "dynamic": True}
        return {**usual, **_INPUTS[name]}

    def inputs_name(self, recipe: Recipe) -> str:
        """How they are rounded, a key of _INPUTS; "" where they stay in 16 bits."""
        return recipe.activations

    def not_in_words(self, raw: Mapping[str, Any]) -> Unavailable:
        """Why a format without words is not read as groups of columns."""
        return Unavailable(
            _(
                "quantization by {method} has no packed groups of columns",
                method=str(raw.get("format", raw.get("quant_method"))),
            )
        )

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        groups = weight_groups(raw)
        schemes = [group["weights"] for group in (groups if own else groups[:1])]
        weights = schemes[0] if schemes else {}
        if any(
            scheme.get(key) != weights.get(key)
            for scheme in schemes
            for key in ("group_size", "strategy", "symmetric", "actorder")
        ):
            raise Unavailable(
                _("linears differ in more than their width ({key}): their shapes are not checked", key="config_groups")
            )
        if raw.get("format") != self.layout or weights.get("strategy") not in ("group", "channel"):
            return super().read(raw, file, pointer, own)
        return Quantization(
            self,
            self,
            Scheme(
                whole(weights, "num_bits"),
                whole(weights, "group_size") if weights["strategy"] == "group" else -1,
                bool(weights.get("symmetric", True)),
            ),
            weights.get("actorder") in ("group", True),
            self.layout,
            dict(raw),
            file,
            pointer,
            Widths.of_patterns(_own_widths(groups) if own else ()),
        )

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """Names, and patterns after "re:"; a name of a class excludes what only a model knows."""
        found = []
        for at, entry in enumerate(_as_list(raw.get("ignore"))):
            if isinstance(entry, str):
                pattern = entry.removeprefix("re:") if entry.startswith("re:") else exactly(entry)
                found.append(Exclusion.of_pattern(entry, f"/ignore/{at}", pattern))
        return found

    def targets(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        return targets_of(raw)

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """The targets of its groups, a class of modules being all linears."""
        excluded, named = self.excluded(raw), self.targets(raw)
        every = any(OTHER_CLASS.match(entry.entry) is None for entry in named)
        return lambda module: not excluded(module) and (every or any(entry.matches(module) for entry in named))

    def inputs_of(self, raw: Mapping[str, Any]) -> InputsOf | None:
        return of_groups(weight_groups(raw))

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        return of_compressed_tensors(raw)

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        chosen = group_of(raw)

        def parts(module: str, sizes: Sizes | None) -> list[Wanted]:
            group = chosen(module)
            return of_group(group, group.get("format") or raw.get("format"), sizes) if group is not None else []

        return parts

    def stored_bits(self, raw: Mapping[str, Any]) -> int | None:
        """Of files whose groups agree."""
        found = [group["weights"].get("num_bits") for group in weight_groups(raw)]
        return found[0] if found and type(found[0]) is int and all(bits == found[0] for bits in found) else None

    def names_of_kept(self, module: str) -> list[str]:
        """vLLM asks for the linears that would be in the module."""
        return [module, rf"re:^{re.escape(module)}\."]


def _cache_scheme(name: str) -> dict[str, Any] | None:
    """kv_cache_scheme of a recipe's cache, as QuantizationArgs has it."""
    if not name:
        return None
    strategy = "attn_head" if name == "fp8-head" else "tensor"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True}


def weight_groups(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups that say something of weights, the one for all Linear first; "targets" are texts."""
    groups = raw.get("config_groups")
    found = [
        {**g, "targets": [t for t in _as_list(g.get("targets")) if isinstance(t, str)]}
        for g in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(g, dict) and isinstance(g.get("weights"), dict)
    ]
    return sorted(found, key=lambda g: g["targets"] != ["Linear"])


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _own_widths(groups: list[dict[str, Any]]) -> Iterable[tuple[str, object]]:
    """(pattern, bits) of what the further groups name."""
    for group in groups[1:]:
        for target in group["targets"]:
            pattern = target.removeprefix("re:") if target.startswith("re:") else exactly(target)
            yield pattern, group["weights"].get("num_bits")


def _sides(codes: Array) -> Array:
    """The shape of codes, i64[2], on the CPU."""
    if is_torch(codes):
        import torch

        return torch.tensor(codes.shape, dtype=torch.int64)
    return np.array(codes.shape, np.int64)


def _stored_sides(parts: Parts) -> tuple[int, int]:
    n, k = (int(side) for side in parts["weight_shape"].tolist())
    return n, k


def _require_bits(bits: int) -> None:
    if bits not in GRID_BITS:
        raise NotQuantizable(
            _("bits is {bits}: compressed-tensors has {known}.", bits=bits, known=", ".join(map(str, GRID_BITS)))
        )
