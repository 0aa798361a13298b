"""Weights with one scale for each block of rows and columns, cut by tensor parallelism.

An engine gives each GPU whole blocks, because a block has one scale. vLLM and SGLang cut q, k, v, gate and up along
their outputs and down and o along their inputs, and check each part of a joined matrix by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from doctor.core.facts import fact
from doctor.core.recipe import Scheme
from doctor.model.linears import ROW_PARALLEL, Linear
from doctor.model.spec import ModelSpec

WHOLE = frozenset({"q_a", "kv_a"})  # low-rank projections that every GPU holds whole


class BlockedLinear(NamedTuple):
    """A linear whose scales belong to blocks of `tile` = (rows, columns)."""

    linear: Linear
    tile: tuple[int, int]


class Cut(NamedTuple):
    """One axis that tensor parallelism cuts: `size` values in units of which `copies` GPUs at most hold their own.

    copies: 0 where every GPU has a part of its own; else the number of key-value heads, which are repeated on more
    GPUs than that.
    """

    role: str
    size: int
    block: int
    copies: int

    def share(self, tp: int) -> float:
        """Values on one GPU; no whole number where they do not divide."""
        return self.size / (min(tp, self.copies) if self.copies else tp)

    def fits(self, tp: int) -> bool:
        return self.share(tp) % self.block == 0


@fact("checkpoint", cost="header")
def blocked_linears(checkpoint, spec, stored_weights) -> tuple[BlockedLinear, ...]:
    """Linears whose scales belong to blocks of rows and columns (BlockedLinear)."""
    found = []
    for linear in spec.linears:
        weight = stored_weights.get(linear.tensor)
        tile = _tile(weight.scheme) if weight is not None else ()
        if len(tile) == 2:
            found.append(BlockedLinear(linear, tile))
    return tuple(found)


def _tile(scheme: Scheme) -> tuple[int, int] | tuple[()]:
    """(rows, columns) under one scale; () where a scale serves a whole row or tensor."""
    if len(scheme.tile) == 2:
        return (scheme.tile[0], scheme.tile[1])
    return (1, scheme.group_size) if scheme.group_size > 0 else ()


def cuts(blocked: BlockedLinear, spec: ModelSpec) -> tuple[Cut, ...]:
    """The axes of a linear that tensor parallelism cuts, each part of a joined matrix by itself."""
    linear, (rows, columns) = blocked
    kv, heads = spec.n_kv_heads or 0, spec.n_heads or 0
    if linear.role in WHOLE:
        return ()
    if linear.role in ROW_PARALLEL:
        return (Cut(linear.role, linear.in_features, columns, 0),)
    if linear.role == "qkv" and heads and kv and linear.out_features % (heads + 2 * kv) == 0:
        width = linear.out_features // (heads + 2 * kv)
        return (Cut("q", heads * width, rows, 0), Cut("k", kv * width, rows, kv))
    if linear.role == "gate_up":
        return (Cut(linear.role, linear.out_features // 2, rows, 0),)
    return (Cut(linear.role, linear.out_features, rows, kv if linear.role in ("k", "v") else 0),)
