"""Quantization groups per linear: as the recipe plans them for floats, or as a quantized checkpoint already has them.

Geometry rules (G3xx) judge a Layout and need not ask which of the two it is. Where a checkpoint is quantized in
a way that has no groups of columns (FP8, bitsandbytes, EXL2), the layout is unavailable and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import Unavailable, fact, key_of
from doctor.core.messages import _
from doctor.core.recipe import Recipe, is_kept
from doctor.formats.base import Format, Quantization
from doctor.formats.known import says_packed
from doctor.formats.registry import KNOWN, format_of_words, read_quantization, word_tails
from doctor.model.fused_experts import find_fused_experts
from doctor.model.linears import NOT_TEXT, Linear
from doctor.model.quantization_config import quantization_of
from doctor.model.spec import ModelSpec
from doctor.plan.sizes import role_of

# Linears that a serving engine stores as one matrix, so that they must be quantized alike or not at all.
FUSED = (("q", "k", "v"), ("gate", "up"))


class GroupedLinear(NamedTuple):
    """One linear that is, or will be, stored in groups of group_size in_features (-1: whole rows)."""

    name: str
    role: str
    block: int | None
    expert: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Layout:
    """The grouped linears and what they share. `quantized` is true where the files hold them already."""

    quantized: bool
    format: str  # a format's name; `packing` is the format itself
    bits: int  # of most linears, where single ones have widths of their own
    group_size: int
    sym: bool
    act_order: bool  # groups scattered over columns (g_idx), not merely another order of work
    linears: tuple[GroupedLinear, ...]
    missed: tuple[str, ...] = ()  # linears left in floats though others are grouped

    @property
    def packing(self) -> Format:
        """The format that the linears are, or will be, stored in."""
        return KNOWN[self.format]


@fact("checkpoint", cost="header")
def layout(checkpoint, recipe, spec, tensors, goal):
    """The linears in groups, planned or stored (Layout)."""
    block, tails = quantization_of(checkpoint), word_tails()
    packed = [info for name, info in tensors.items() if name.endswith(tails)]
    if not packed and goal != "quantize" and (block is None or not says_packed(block[0])):
        raise Unavailable(_("nothing is to be quantized (--for {goal})", goal=goal))
    if block is None and not packed:
        return planned_layout(recipe, spec, tensors)
    if block is None:
        raise Unavailable(_("the tensors are packed but no file says how"))
    return stored_layout(read_quantization(*block), packed, spec, tensors)


class Split(NamedTuple):
    """Linears that are or will be quantized, and names of those that stay in floats. stored: the files hold them so."""

    linears: tuple[GroupedLinear | Linear, ...]
    missed: frozenset[str]
    bits: int
    stored: bool


@fact("checkpoint", cost="header")
def split(checkpoint, spec, tensors, stored_weights, layout=None) -> Split:
    """Which linears are quantized and which are not, in any format (Split)."""
    if layout is not None:
        plain = layout.linears if layout.quantized else spec.linears
        missed = frozenset(layout.missed)
        rest = (x for x in spec.linears if x.name in missed) if layout.quantized else ()
        return Split((*plain, *rest), missed, layout.bits, layout.quantized)
    if not stored_weights:
        raise Unavailable(_("no linear is quantized"))
    missed = frozenset(x.name for x in spec.linears if x.tensor not in stored_weights)
    bits = next(iter(stored_weights.values())).scheme.bits
    return Split(spec.linears, missed, bits, True)


def planned_layout(recipe: Recipe, spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> Layout:
    """Layout that the recipe gives to float linears. Raises Unavailable where the weights are not plain floats."""
    floats = [x for x in spec.linears if tensors[x.tensor].dtype.name in ("BF16", "F16", "F32", "F64")]
    if not floats:
        raise Unavailable(
            _("no linear is known by its name") if not spec.linears else _("no linear holds 16- or 32-bit floats")
        )
    kept = tuple(x.name for x in floats if is_kept(recipe, x.name)) if recipe.keep else ()
    out = set(kept)
    apart = [
        x
        for found in find_fused_experts(spec, tensors, recipe)
        if not found.why
        for x in found.linears
        if not is_kept(recipe, x.name)
    ]
    linears = tuple(
        GroupedLinear(x.name, x.role, x.block, x.expert, x.in_features, x.out_features)
        for x in (*floats, *apart)
        if x.name not in out
    )
    return Layout(False, recipe.output_format, recipe.bits, recipe.group_size, bool(recipe.sym), False, linears, kept)


def stored_layout(
    quant: Quantization, packed: list[TensorInfo], spec: ModelSpec, tensors: Mapping[str, TensorInfo]
) -> Layout:
    """Layout that packed tensors have, their sizes read from their shapes."""
    linears = []
    for info in packed:
        name = info.name.rpartition(".")[0]
        if len(info.shape) != 2 or NOT_TEXT.search(name):
            continue
        size = packed_size(quant, info)
        role, block, expert = role_of(name, spec)
        linears.append(GroupedLinear(name, role, block, expert, *size))
    have = {x.name for x in linears}
    missed = tuple(x.name for x in spec.linears if x.name not in have)
    act_order = quant.desc_act and quant.group_size != -1
    return Layout(True, quant.format.name, quant.bits, quant.group_size, quant.sym, act_order, tuple(linears), missed)


def packed_size(quant: Quantization, words: TensorInfo) -> tuple[int, int]:
    """(in_features, out_features) of a packed linear, from the tensor that holds its codes."""
    module, _dot, tail = words.name.rpartition(".")
    form = quant.format if tail == quant.format.words else format_of_words(words.name) or quant.format
    return form.size(words.shape, quant.bits_of(module), quant.version)


def together(linears: Iterable, names: Iterable[str]) -> list[str]:
    """These linears and those that an engine stores with one of them as one matrix, in order: they are quantized alike
    or not at all.
    """
    wanted = set(names)
    sets: dict[tuple, list[str]] = {}
    for x in linears:
        for fused in (f for f in FUSED if x.role in f):
            sets.setdefault((x.name.rpartition(".")[0], fused), []).append(x.name)
    for members in sets.values():
        if wanted & set(members):
            wanted |= set(members)
    return sorted(wanted)


LAYOUT = key_of(layout)
