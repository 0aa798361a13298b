"""AWQ, version "gemm": four bits, words along out_features in an order of their own.

| tensor | dtype | shape |
|---|---|---|
| qweight | I32 | [k, n/8], packed along n |
| qzeros | I32 | [G, n/8] |
| scales | F16 | [G, n] |

Field p of a word (bits 4p..4p+3) holds column ORDER[p] of its eight. Zero points are stored as they are. Version
"gemv" has its words along in_features; its shapes are judged, its words are not read.

Sources: casper-hansen/AutoAWQ 0.2.9 awq/modules/linear/gemm.py and gemv.py, awq/utils/packing_utils.py. AutoAWQ asserts
out_features % 8 but sizes its buffer by 32, so 32 is what works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous
from doctor.formats.base import Format, Part, Parts, Quantization, Shapes
from doctor.formats.bits import kernels_for, pack_columns, unpack_columns
from doctor.formats.exclusions import Exclusion
from doctor.formats.grid import Grid, dequantize, neighbours, stored_exactly
from doctor.formats.refusals import Refused, of_awq
from doctor.formats.registry import register
from doctor.formats.requirements import require_dividing, require_known, require_shape, whole
from doctor.formats.wanted import Sizes, Wanted

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field p of a word holds column ORDER[p] of its eight
_INVERSE = tuple(ORDER.index(column) for column in range(8))


@register
class AWQ(Format):
    """The format of AutoAWQ."""

    name = "awq"
    label = "AWQ"
    quant_methods = ("awq",)
    agreed = ("bits", "group_size", "zero_point", "version")
    words, scales, zeros = "qweight", "scales", "qzeros"
    part_names = ("qweight", "qzeros", "scales")
    needed = ("scales", "qzeros")
    sampled = ("qzeros",)
    bits = (4,)
    own_widths = False
    unit = (1, 32)
    plain_backend = "torch_awq"
    affine = True
    libraries = ("gptqmodel", "accelerate")
    stores_zeros = True
    plain_key = "modules_to_not_convert"

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        groups = 1 if scheme.group_size == -1 else -(-in_features // scheme.group_size)
        return (
            Part("qweight", "I32", (in_features, -(-out_features // 8))),
            Part("qzeros", "I32", (groups, -(-out_features // 8))),
            Part("scales", "F16", (groups, out_features)),
        )

    def size(self, words: tuple[int, ...], bits: int, version: str = "") -> tuple[int, int]:
        if version == "gemv":
            return words[1] * 32 // bits, words[0]
        return words[0], words[1] * 32 // bits

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        n, k = codes.shape
        if n % 32:
            raise NotQuantizable(
                _("AWQ gemm packing of [{rows}, {columns}]: out_features must be a multiple of 32.", rows=n, columns=k),
                _("Pad them, or keep this linear in 16 bits."),
            )
        return {
            "qweight": pack_fields(codes),
            "qzeros": pack_fields(grid.zero),
            "scales": contiguous(stored_exactly(grid.scale.T, self.grid(scheme).scale_dtype)),
        }

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        kernels = kernels_for(parts["qweight"]) if rows is None else None
        if kernels is not None:
            self._require_fitting(parts)
            return kernels.awq_dequantize(*(contiguous(parts[name]) for name in self.part_names))
        return dequantize(*self.codes(parts, scheme, rows=rows))

    def codes(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> tuple[Array, Grid, Array]:
        """(codes u8[n, k], grid, g_idx i32[k]) of a linear, or of those rows of it."""
        k, groups, n = self._require_fitting(parts)
        rows = rows or slice(0, n)
        first, last = rows.start // 8, -(-rows.stop // 8)
        inside = slice(rows.start - first * 8, rows.stop - first * 8)
        codes, zero = (unpack_fields(contiguous(parts[name][:, first:last]))[inside] for name in ("qweight", "qzeros"))
        scale = contiguous(cast(parts["scales"][:, rows].T, "F32"))
        return codes, Grid(scale, cast(zero, "I32")), neighbours(k, groups, scale)

    def _require_fitting(self, parts: Parts) -> tuple[int, int, int]:
        """(k, groups, n) of a linear whose tensors fit each other."""
        (k, width), groups = parts["qweight"].shape, parts["scales"].shape[0]
        require_shape("qzeros", parts["qzeros"], (groups, width))
        require_shape("scales", parts["scales"], (groups, width * 8))
        require_dividing(k, groups)
        return k, groups, width * 8

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": recipe.bits,
            "group_size": recipe.group_size,
            "zero_point": not recipe.sym,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *sorted(kept)],
        }

    def claims(self, raw: Mapping[str, Any]) -> bool:
        stated = raw.get("quant_method")
        return stated in self.quant_methods or (not stated and "zero_point" in raw)

    def read(self, raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
        version = str(raw.get("version") or raw.get("format") or "gemm").lower()
        require_known("version", version, ("gemm", "gemv"))
        return Quantization(
            self,
            self,
            Scheme(
                whole(raw, "bits", "w_bit"), whole(raw, "group_size", "q_group_size"), not raw.get("zero_point", True)
            ),
            False,
            version,
            dict(raw),
            file,
            pointer,
            readable=version == "gemm",
        )

    def refused(self, raw: Mapping[str, Any]) -> Iterable[Refused]:
        return of_awq(raw)

    def wanted(self, raw: Mapping[str, Any]) -> Callable[[str, Sizes | None], list[Wanted]]:
        version = str(raw.get("version") or raw.get("format") or "gemm").lower()
        says = f"version {version}"

        def parts(module: str, sizes: Sizes | None) -> list[Wanted]:
            words: tuple[tuple[int, ...], ...] = ()
            if sizes is not None and version in ("gemm", "gemv"):
                n, k = sizes
                words = ((k, -(-n // 8)),) if version == "gemm" else ((n, -(-k // 8)),)
            return [Wanted("qweight", ("I32",), words, says), Wanted("qzeros", ("I32",), (), says)]

        return parts

    def exclusions(self, raw: Mapping[str, Any]) -> list[Exclusion]:
        """Every entry of modules_to_not_convert is a part of a name."""
        entries = raw.get("modules_to_not_convert")
        return [
            Exclusion.of_part(entry, f"/modules_to_not_convert/{at}")
            for at, entry in enumerate(entries if isinstance(entries, list) else ())
            if isinstance(entry, str)
        ]

    def listed_as_plain(self, raw: Mapping[str, Any], module: str) -> bool:
        return self.excluded(raw)(module)

    def with_plain(self, raw: Mapping[str, Any], packed: Iterable[str], plain: Iterable[str]) -> list[str]:
        stated = raw.get(self.plain_key) or ["lm_head"]
        return [*stated, *(name for name in plain if not self.excluded(raw)(name))]

    def headers_tell(self, raw: Mapping[str, Any]) -> bool:
        return not raw.get(self.plain_key)

    def shown(self, shapes: Mapping[str, Shapes], words: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
        found = {_group(linear) for linear in shapes.values()}
        if len(found) != 1 or None in found:
            return None
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": found.pop(),
            "zero_point": True,
            "version": "gemm",
        }


def pack_fields(codes: Array) -> Array:
    """i32[c, n/8] of codes [n, c], eight rows to a word in AWQ's order."""
    kernels = kernels_for(codes)
    if kernels is not None:
        return kernels.awq_words(cast(codes, "U8"))
    n, columns = codes.shape
    ordered = codes.reshape(n // 8, 8, columns)[:, list(ORDER)].reshape(n, columns)
    return contiguous(pack_columns(ordered, 4).T)


def unpack_fields(words: Array) -> Array:
    """codes u8[n, c] of words i32[c, n/8]."""
    columns, width = words.shape
    fields = unpack_columns(contiguous(words.T), 4, width * 8)
    return fields.reshape(width, 8, columns)[:, list(_INVERSE)].reshape(width * 8, columns)


def _group(shapes: Shapes) -> int | None:
    """group_size of one linear by its shapes, None where they do not fit together."""
    words, zeros, scales = (shapes.get(part, ()) for part in ("qweight", "qzeros", "scales"))
    if not len(words) == len(zeros) == len(scales) == 2:
        return None
    groups, height = scales
    if words[1] == height or words[1] * 8 != height or zeros != (groups, words[1]) or not groups or words[0] % groups:
        return None
    return words[0] // groups if groups > 1 else -1
