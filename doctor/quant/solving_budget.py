"""What solving one linear takes of memory, from its shape: sizes that the solvers keep to, and what a GPU holds."""

from __future__ import annotations

from collections.abc import Iterable

from doctor.core.recipe import Recipe
from doctor.formats.registry import format_of
from doctor.model.linears import Linear
from doctor.scan import native

# Of the weights, and again of the errors, that a native loop works on: the fewer rows, the more often the square is
# packed for them. With 1365 rows of k = 49,152 packing is a twentieth of the work.
LOOP_BYTES = 1 << 28
CHUNK_BYTES = 1 << 26  # of the rows that are worked on at a time where nothing is shared between them
# Of a factor or a Hessian, packed at a time for the rows of one call: more saves nothing, and below k = 4096 it is all.
PACKED_BYTES = 1 << 26
TILE = 2048  # of a square that is factored by tiles
# Matrices of [k, k] and of [n, k] in float32 that solving one linear in torch holds at its peak, besides its Hessian
# and its weight.
_SQUARES, _OBLONGS = 6, 6
# Of some rows of W in float32, where the square lies in the host's memory: hosted.py holds weights, errors, codes,
# scales and zero points of each, and products of some.
_OBLONGS_HOSTED = 8


def solving_in_torch(linears: Iterable[Linear], calibrated: bool) -> int:
    """Bytes that torch takes for the widest of them, besides its Hessian and its weight."""
    return max(
        (4 * x.in_features * (_SQUARES * x.in_features * calibrated + _OBLONGS * x.out_features) for x in linears),
        default=0,
    )


def can_be_hosted(recipe: Recipe) -> bool:
    """Whether the Hessians of a GPU's run can lie in the host's memory: of GPTQ, whose loop takes their rows."""
    plain = not recipe.folds_scales and not format_of(recipe).in_blocks
    return recipe.solver.factors and plain and native.level() is not None


def products_of(linears: Iterable[Linear]) -> int:
    """Bytes of a GPU for a row of tiles of X^T X, before it is added up in the host's memory, and for its sum."""
    return 8 * TILE * max((x.in_features for x in linears), default=0)


def solving_hosted(linears: Iterable[Linear]) -> int:
    """Bytes of a GPU that solving the widest takes where its square lies in the host's memory, besides its weight."""
    return max((_hosted(x) for x in linears), default=0)


def _hosted(x: Linear) -> int:
    n, k = x.out_features, x.in_features
    some = min(n, max(1, LOOP_BYTES // (4 * k)))  # rows of the loops
    rows = 4 * k * max(TILE, 3 * 128)  # of the square, as products or panels take them
    expert = 2 * n * k if x.expert is not None else 0
    packing = 8 * n * k  # the weights of the codes and of the packed words, which are compared
    return expert + n * k + max(packing, _OBLONGS_HOSTED * 4 * some * k + 2 * rows)
