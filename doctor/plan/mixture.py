"""Bits of single linears that a mixture gives by role and layer, as patterns of the recipe; the user's own come after
them, so they count. And the types that widths then allow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from doctor.core.recipe import Recipe, is_kept
from doctor.formats.gguf import blocks_of
from doctor.formats.registry import format_of
from doctor.model.spec import ModelSpec


class PlannedType(NamedTuple):
    """The block type of one linear. wanted: what the mixture asks for; given: what the width allows."""

    linear: str
    in_features: int
    weights: int
    wanted: str
    given: str
    nbytes: int


def with_mixture(recipe: Recipe, spec: ModelSpec) -> Recipe:
    """The recipe with the bits that its format gives single linears; the recipe itself where it gives none."""
    if not format_of(recipe).in_blocks:
        return recipe
    form, layers = blocks_of(recipe), spec.n_layers or 0
    sharing = (spec.n_heads or 1) // max(spec.n_kv_heads or 1, 1)
    experts = experts_of(spec)
    own: dict[tuple[str, str, int], list[int]] = {}
    for linear in spec.linears:
        if linear.block is None:
            continue
        bits = form.own_bits(recipe.bits, linear.role, linear.block, layers, sharing, experts)
        if bits != recipe.bits:
            before, _dot, after = linear.name.partition(f".{linear.block}.")
            own.setdefault((before, after, bits), []).append(linear.block)
    patterns = [f"{before}.{_choice(blocks)}.{after}={bits}" for (before, after, bits), blocks in own.items()]
    missing = [pattern for pattern in patterns if pattern not in recipe.bits_for]
    return replace(recipe, bits_for=(*missing, *recipe.bits_for)) if missing else recipe


def experts_of(spec: ModelSpec) -> int:
    """Experts in a layer, 0 where there are none."""
    return 1 + max((x.expert for x in spec.linears if x.expert is not None), default=-1)


def _choice(blocks: list[int]) -> str:
    return str(blocks[0]) if len(blocks) == 1 else "{" + ",".join(map(str, blocks)) + "}"


def planned_types(recipe: Recipe, spec: ModelSpec) -> list[PlannedType]:
    """The block type of every linear that a recipe of the GGUF container quantizes."""
    form, found = blocks_of(recipe), []
    for x in spec.linears:
        if x.block is None or is_kept(recipe, x.name) or form.unfit(recipe.scheme, x.in_features, x.out_features):
            continue
        own = recipe.for_linear(x.name)
        wanted, given = form.type_of(own.bits, 0), form.type_of(own.bits, x.in_features)
        nbytes = form.bytes(x.in_features, x.out_features, own.scheme)
        found.append(
            PlannedType(x.name, x.in_features, x.in_features * x.out_features, wanted.name, given.name, nbytes)
        )
    return found
