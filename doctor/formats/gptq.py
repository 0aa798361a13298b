"""GPTQ, checkpoint_format "gptq": words along in_features, zero points stored minus one.

| tensor | dtype | shape |
|---|---|---|
| qweight | I32 | [k*b/32, n], packed along k |
| qzeros | I32 | [G, n*b/32], packed along n, zero - 1 in each field |
| scales | F16 | [G, n] |
| g_idx | I32 | [k], the group of each column |

A zero point of 0 would be stored as -1: one writer lets it borrow from the next field, another overwrites seven
neighbours with it, so it is refused. desc_act is false even with act-order, because groups are fixed beforehand and
serving costs nothing.

Sources: ModelCloud/GPTQModel gptqmodel/nn_modules/qlinear/__init__.py, utils/model.py, quantization/config.py
(dynamic_get); AutoGPTQ 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py; vllm-project/vllm
vllm/model_executor/layers/quantization/gptq.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.methods import BITS
from doctor.core.recipe import Recipe, Scheme
from doctor.core.version import __version__
from doctor.formats.arrays import Array, cast, contiguous
from doctor.formats.base import Format, Part, Parts, Quantization, Shapes
from doctor.formats.bits import (
    kernels_for,
    pack_columns,
    pack_rows,
    repeated_word,
    unpack_columns,
    unpack_rows,
    words_of,
)
from doctor.formats.exclusions import Exclusion
from doctor.formats.grid import Grid, GridKind, dequantize, neighbours, stored_exactly
from doctor.formats.refusals import Refused, of_gptq
from doctor.formats.registry import KNOWN, register
from doctor.formats.requirements import require_dividing, require_groups, require_known, require_shape, whole
from doctor.formats.wanted import FLOATS, Sizes, Wanted
from doctor.formats.widths import Widths, exactly, own_entries

# Linears that vLLM joins, and what it calls them.
_JOINED = (("q_proj", ("k_proj", "v_proj"), "qkv_proj"), ("gate_proj", ("up_proj",), "gate_up_proj"))


@register
class GPTQ(Format):
    """checkpoint_format "gptq" (version 1). GPTQv2 differs in zero_offset alone."""

    name = "gptq"
    label = "GPTQ"
    quant_methods: tuple[str, ...] = ("gptq", "gptq_marlin", "auto_gptq")
    config_files = ("quantize_config.json",)
    agreed: tuple[str, ...] = ("bits", "group_size", "sym", "desc_act", "checkpoint_format")
    words, scales, zeros, index = "qweight", "scales", "qzeros", "g_idx"
    part_names = ("qweight", "qzeros", "scales", "g_idx")
    needed = ("scales", "qzeros")
    sampled = ("qzeros", "g_idx")
    bits = BITS
    widths_key = "dynamic"
    unit = (32, 32)
    zero_offset = 1
    twin = "gptq_v2"
    plain_backend = "torch"
    libraries = ("gptqmodel", "optimum")
    affine = True
    signed_below = 4
    head_key = "lm_head"
    plain_key = "modules_in_block_to_quantize"
    order_key = "desc_act"

    def zeros_are_free(self, bits: int) -> bool:
        """Every file stores zero points. Marlin, which takes symmetric codes alone, has 4 and 8 bits; what reads fewer
        reads zero points too.
        """
        return bits < 4

    def grid(self, scheme: Scheme) -> GridKind:
        return GridKind(
            scheme.bits, scheme.group_size, scheme.sym, zero_min=self.zero_offset, signed=self.signs(scheme)
        )

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        groups = 1 if scheme.group_size == -1 else -(-in_features // scheme.group_size)
        return (
            Part("qweight", "I32", (words_of(in_features, scheme.bits), out_features)),
            Part("qzeros", "I32", (groups, words_of(out_features, scheme.bits))),
            Part("scales", "F16", (groups, out_features)),
            Part("g_idx", "I32", (in_features,)),
        )

    def size(self, words: tuple[int, ...], bits: int, version: str = "") -> tuple[int, int]:
        return words[0] * 32 // bits, words[1]

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        n, k = codes.shape
        _require_bits(scheme.bits)
        if k % 32 or n % 32:
            raise NotQuantizable(
                _(
                    "GPTQ packing of [{rows}, {columns}]: out_features and in_features must be multiples of 32.",
                    rows=n,
                    columns=k,
                ),
                _("Pad them, or keep this linear in 16 bits."),
            )
        zero = grid.zero
        if int(zero.min()) < self.zero_offset:
            row, group = divmod(int(zero.argmin()), zero.shape[1])
            raise NotQuantizable(
                _(
                    "GPTQ v1 stores zero - 1, and row {row}, group {group} has zero {zero} ({count} such groups): "
                    "zeros must be 1..{most}.",
                    row=row,
                    group=group,
                    zero=int(zero.min()),
                    count=int((zero < self.zero_offset).sum()),
                    most=2**scheme.bits - 1,
                ),
                _("Fit the grid with zero_min=1, or write gptq_v2."),
            )
        if g_idx is None:
            g_idx = neighbours(k, grid.scale.shape[1], codes)
        return {
            "qweight": pack_columns(contiguous(codes.T), scheme.bits),
            "qzeros": pack_rows((zero - self.zero_offset).T, scheme.bits),
            "scales": contiguous(stored_exactly(grid.scale.T, self.grid(scheme).scale_dtype)),
            "g_idx": cast(g_idx, "I32"),
        }

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        kernels = kernels_for(parts["qweight"]) if rows is None else None
        if kernels is not None:
            _k, _n, g_idx = self._fitting(parts, scheme.bits)
            return kernels.gptq_dequantize(
                *(contiguous(parts[name]) for name in ("qweight", "qzeros", "scales")),
                contiguous(g_idx),
                scheme.bits,
                version=2 - self.zero_offset,
            )
        return dequantize(*self.codes(parts, scheme, rows=rows))

    def codes(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> tuple[Array, Grid, Array]:
        """(codes u8[n, k], grid, g_idx i32[k]) of a linear, or of those rows of it. Without g_idx, groups of
        neighbours.

        A stored zero point is zero - 1. Its highest value means 2^bits: written so by no grid of ours, read so by
        engines.
        """
        k, n, g_idx = self._fitting(parts, scheme.bits)
        rows = rows or slice(0, n)
        codes = contiguous(unpack_columns(contiguous(parts["qweight"][:, rows]), scheme.bits, k).T)
        zero = cast(unpack_rows(parts["qzeros"], scheme.bits, n), "I32") + self.zero_offset
        scale = contiguous(cast(parts["scales"][:, rows].T, "F32"))
        return codes, Grid(scale, contiguous(zero[:, rows].T)), g_idx

    def _fitting(self, parts: Parts, bits: int) -> tuple[int, int, Array]:
        """(k, n, g_idx i32[k]) of a linear whose tensors fit each other."""
        _require_bits(bits)
        k, n = self.size(parts["qweight"].shape, bits)
        groups = parts["scales"].shape[0]
        require_shape("qzeros", parts["qzeros"], (groups, words_of(n, bits)))
        require_shape("scales", parts["scales"], (groups, n))
        g_idx = parts.get("g_idx")
        if g_idx is None:
            require_dividing(k, groups)
            g_idx = neighbours(k, groups, parts["scales"])
        require_groups(g_idx, k, groups)
        return k, n, cast(g_idx, "I32")

    def zero_word(self, bits: int) -> int | None:
        return repeated_word(2 ** (bits - 1) - self.zero_offset, bits) if 32 % bits == 0 else None

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        stated: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "format": self.name,
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "desc_act": False,
            "sym": recipe.sym,
            "lm_head": False,
            "true_sequential": True,
            "static_groups": True,
            "damp_percent": recipe.damp,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"doctor:{__version__}"]},
        }
        widths = widths or {}
        dynamic: dict[str, Any] = {f"-:{exactly(name)}": {} for name in _with_joined(kept)}
        for bits in sorted(set(widths.values())):
            names = _with_joined([name for name, own in widths.items() if own == bits])
            dynamic |= {f"+:{exactly(name)}": {"bits": bits} for name in names}
        return {**stated, "dynamic": dynamic} if dynamic else stated

    def naming_packed(self, stated: dict[str, Any], packed: Iterable[str], plain: Iterable[str]) -> dict[str, Any]:
        """With modules_in_block_to_quantize where some linears stay in 16 bits: optimum, by which transformers loads
        the format, does not know "dynamic", and without this list takes every linear of a decoder layer as packed.
        """
        if not any(key.startswith("-:") for key in stated.get("dynamic", ())):
            return stated
        return {**stated, self.plain_key: self.with_plain(stated, packed, plain)}

    def listed_as_plain(self, raw: Mapping[str, Any], module: str) -> bool:
        """A list that is there is judged by takes()."""
        return bool(_flat(raw.get(self.plain_key)))

    def with_plain(self, raw: Mapping[str, Any], packed: Iterable[str], plain: Iterable[str]) -> list[list[str]]:
        return [_shortest(packed, list(plain))]

    def claims(self, raw: Mapping[str, Any]) -> bool:
        stated = raw.get("quant_method")
        return stated in self.quant_methods or (not stated and "zero_point" not in raw and "desc_act" in raw)

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        """Both versions: which one it is, stands in the block."""
        version = str(raw.get("checkpoint_format") or raw.get("format") or self.name)
        require_known("checkpoint_format", version, (self.name, self.twin))
        entries = (
            [(key.removeprefix("+:"), value.get("bits")) for key, value in own_entries(raw, "dynamic")] if own else []
        )
        return Quantization(
            KNOWN[version],
            self,
            Scheme(whole(raw, "bits"), whole(raw, "group_size"), bool(raw.get("sym", True))),
            bool(raw.get("desc_act", False)),
            version,
            dict(raw),
            file,
            pointer,
            Widths.of_patterns(entries),
        )

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        return of_gptq(raw)

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        quantization = self.read(raw, "", "")

        def parts(module: str, sizes: Sizes | None) -> list[Wanted]:
            bits = quantization.bits_of(module)
            return [
                Wanted("qweight", ("I32",), ((words_of(sizes[1], bits), sizes[0]),) if sizes else (), f"bits {bits}"),
                Wanted("qzeros", ("I32",), (), f"bits {bits}"),
                Wanted("scales", FLOATS, (), f"bits {bits}"),
            ]

        return parts

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """Patterns that begin with "-:", and the output head unless lm_head is true."""
        dynamic = raw.get("dynamic")
        found = [
            Exclusion.of_pattern(key, "/dynamic/" + key.replace("~", "~0").replace("/", "~1"), key.removeprefix("-:"))
            for key in (dynamic if isinstance(dynamic, Mapping) else ())
            if key.startswith("-:")
        ]
        head = [] if raw.get("lm_head") else [Exclusion("", "/lm_head", lambda m: m.rpartition(".")[2] == "lm_head")]
        return head + found

    def targets(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """Patterns that begin with "+:", or have no sign."""
        dynamic = raw.get("dynamic")
        keys = [key for key in (dynamic if isinstance(dynamic, Mapping) else ()) if not key.startswith("-:")]
        pointers = ["/dynamic/" + key.replace("~", "~0").replace("/", "~1") for key in keys]
        return [Exclusion.of_pattern(k, at, k.removeprefix("+:")) for k, at in zip(keys, pointers, strict=True)]

    def takes(self, raw: Mapping[str, Any]) -> Callable[[str], bool] | None:
        """Where modules_in_block_to_quantize is stated, modules with one of its entries in their name, as vLLM does."""
        parts = _flat(raw.get(self.plain_key))
        excluded = self.excluded(raw)
        return (lambda module: any(part in module for part in parts) and not excluded(module)) if parts else None

    def version_key(self, raw: Mapping[str, Any]) -> str:
        return "checkpoint_format" if "checkpoint_format" in raw or "format" not in raw else "format"

    def restated(self, raw: Mapping[str, Any], form: Format) -> dict[str, Any]:
        """Under both keys where both are there."""
        return super().restated(raw, form) | {k: form.name for k in ("checkpoint_format", "format") if k in raw}

    def shown(self, shapes: Mapping[str, Shapes], words: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        """Only for a symmetric file: its zero points are one word, which tells the version too."""
        found = {_bits_and_group(linear) for linear in shapes.values()}
        if len(found) != 1 or None in found:
            return None
        [(bits, group)] = [pair for pair in found if pair]
        zeros, orders = ([seen[part] for seen in words.values() if part in seen] for part in ("qzeros", "g_idx"))
        versions = [
            form.name
            for form in (self, KNOWN[self.twin])
            if (word := form.zero_word(bits)) is not None
            and all(z.kinds is not None and z.kinds.keys() == {word} for z in zeros)
        ]
        indexed = any("g_idx" in linear for linear in shapes.values())
        if len(versions) != 1 or len(zeros) < len(shapes) or (indexed and len(orders) < len(shapes)):
            return None
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": True,
            "desc_act": not all(o.rising for o in orders),
            "checkpoint_format": versions[0],
            "lm_head": "lm_head" in shapes,
        }


def _flat(stated: Any) -> list[str]:
    """The texts of a list, or of a list of lists."""
    lists = [x if isinstance(x, list) else [x] for x in stated] if isinstance(stated, list) else []
    return [text for texts in lists for text in texts if isinstance(text, str)]


def _bits_and_group(shapes: Shapes) -> tuple[int, int] | None:
    """(bits, group_size) of one linear by its shapes, None where they do not fit together."""
    words, zeros, scales = (shapes.get(part, ()) for part in ("qweight", "qzeros", "scales"))
    if not len(words) == len(zeros) == len(scales) == 2:
        return None
    groups, height = scales
    bits = zeros[1] * 32 / height if height else 0
    width = shapes["g_idx"][0] if "g_idx" in shapes else words[0] * 32 / bits if bits else 0
    if bits not in BITS or words != (width * bits / 32, height) or zeros[0] != groups or not groups or width % groups:
        return None
    return int(bits), int(width // groups) if groups > 1 else -1


def _shortest(packed: Iterable[str], plain: list[str]) -> list[str]:
    """Ends of names behind the number of a decoder layer, where no plain linear has them; else whole names. Readers
    look for an entry in a name (vLLM) or at its end (optimum).
    """
    found = set()
    for name in packed:
        end = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
        found.add(name if any(end in other for other in plain) else end)
    return sorted(found)


def _with_joined(names: Iterable[str]) -> list[str]:
    """The names, and those under which vLLM knows linears that it joins."""
    names, found = set(names), []
    for name in sorted(names):
        owner, _dot, last = name.rpartition(".")
        for first, rest, joined in _JOINED:
            if last == first and all(f"{owner}.{other}" in names for other in rest):
                found.append(f"{owner}.{joined}")
    return sorted(names) + found


def _require_bits(bits: int) -> None:
    if bits not in BITS:
        raise NotQuantizable(
            _("bits is {bits}: the packed formats here have {known}.", bits=bits, known=", ".join(map(str, BITS)))
        )
