"""GGUF's mixtures of types, as llama.cpp names them: which linear gets which type, and what it takes.

The bits of a linear choose its type. A mixture gives some linears more bits by their role and layer, as llama-quantize
does; nothing of that is measured. Types of 256 elements do not fit every width: llama.cpp then takes another one, with
more bits, without asking, and so does this format, which says so beforehand (G340).

A file of the output holds all tensors under GGUF's names; while a run goes on, a linear is one tensor named after its
type.

Sources: ggml-org/llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback); layouts in
ggml_blocks.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from doctor.checkpoint.ggml_types import BY_NAME, GgmlType
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, is_torch
from doctor.formats.base import Format, Part, Parts
from doctor.formats.ggml_blocks import decode
from doctor.formats.grid import GridKind
from doctor.formats.registry import format_of, register

# What llama.cpp takes where 256 does not divide in_features.
FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


class GGUF(Format):
    """The K types, by bits: Q4_K_M, Q5_K_M, Q6_K and Q8_0."""

    name = "gguf"
    label = "GGUF"
    container = "gguf"
    in_blocks = True
    bits: tuple[int, ...] = (4, 5, 6, 8)
    methods = ("gptq", "rtn")
    joint = ()
    unit = (32, 1)
    types: Mapping[int, str] = {4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
    mixtures: Mapping[int, str] = {4: "Q4_K_M", 5: "Q5_K_M", 6: "Q6_K", 8: "Q8_0"}  # what llama.cpp calls the file

    def type_of(self, bits: int, in_features: int) -> GgmlType:
        """The type of a linear of these bits and this width."""
        kind = BY_NAME[self.types[bits]]
        return kind if in_features % kind.block == 0 else BY_NAME[FALLBACKS.get(kind.name, kind.name)]

    def outer_type(self, name: str, bits: int, in_features: int, tied: bool) -> GgmlType:
        """The type of the embedding or the output head, by GGUF's name; an embedding that is the head too is that."""
        if name != "output.weight" and not tied:
            return self.type_of(bits, in_features)
        wanted = BY_NAME[self.types[bits]]
        return BY_NAME["Q8_0" if wanted.name == "Q8_0" or in_features % BY_NAME["Q6_K"].block else "Q6_K"]

    def own_bits(self, bits: int, role: str, layer: int, layers: int, sharing: int, experts: int = 0) -> int:
        """Bits of a linear under this mixture. sharing: query heads that share one key and value head. experts: in a
        layer; of eight, attention is so small a share of the file that llama-quantize gives it more bits.
        """
        if experts == 8 and role in ("k", "v"):
            return 8
        if experts == 8 and role == "o" and bits == 4:
            return 5
        early, late = layers // 8, 7 * layers // 8
        more = layer < early or layer >= late or (layer - early) % 3 == 2
        return 6 if bits in (4, 5) and role in ("v", "down") and more else bits

    def grid(self, scheme: Scheme) -> GridKind:
        return GridKind(scheme.bits, 32, False)

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        if in_features % 32:
            return _("in_features {size} is not a multiple of 32, the smallest block of GGUF", size=in_features)
        return ""

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        kind = self.type_of(scheme.bits, in_features)
        return (Part(kind.name, "U8", (out_features, in_features // kind.block * kind.nbytes)),)

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        name, words = next((name, part) for name, part in parts.items() if name in BY_NAME)
        kind, rows = BY_NAME[name], rows or slice(0, words.shape[0])
        raw = words[rows]
        width = raw.shape[1] // kind.nbytes * kind.block
        if not is_torch(raw):
            return decode(raw, kind, width)
        import torch

        return torch.from_numpy(decode(raw.cpu().numpy(), kind, width).copy()).to(raw.device)

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        return {}  # the types stand in the file


def blocks_of(recipe: Recipe) -> GGUF:
    """The format of a recipe that writes blocks (Format.in_blocks)."""
    form = format_of(recipe)
    assert isinstance(form, GGUF)
    return form


@register
class GGUFByBits(GGUF):
    """The format under its plain name."""


@register
class GGUFQ4Zero(GGUF):
    """Q4_0: one float16 scale a block of 32, the type that most hardware is fast at."""

    name = "gguf-q4_0"
    label = "GGUF Q4_0"
    bits = (4, 8)
    types: Mapping[int, str] = {4: "Q4_0", 8: "Q8_0"}
    mixtures: Mapping[int, str] = {4: "Q4_0", 8: "Q8_0"}

    def own_bits(self, bits: int, role: str, layer: int, layers: int, sharing: int, experts: int = 0) -> int:
        return 8 if experts == 8 and role in ("k", "v") else bits


@register
class GGUFIQ4XS(GGUF):
    """IQ4_XS: sixteen uneven levels, and 6-bit scales of blocks of 32 under one float16 scale of 256."""

    name = "gguf-iq4_xs"
    label = "GGUF IQ4_XS"
    bits = (4, 5, 8)
    types: Mapping[int, str] = {4: "IQ4_XS", 5: "Q5_K", 8: "Q8_0"}
    mixtures: Mapping[int, str] = {4: "IQ4_XS", 5: "IQ4_XS", 8: "Q8_0"}

    def own_bits(self, bits: int, role: str, layer: int, layers: int, sharing: int, experts: int = 0) -> int:
        if experts == 8 and role in ("k", "v"):
            return 8
        return 5 if (role == "v" and sharing >= 4) or (role == "o" and experts == 8) else bits
