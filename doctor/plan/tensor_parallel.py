"""Sizes of the matrices on one GPU when tensor parallelism splits each linear."""

from __future__ import annotations

from doctor.model.linears import ROW_PARALLEL
from doctor.plan.groups import FUSED, GroupedLinear, Layout

_ORDER = [role for fused in FUSED for role in fused]  # the order in which engines join them


def on_one_gpu(layout: Layout, tp: int, n_kv_heads: int | None) -> list[tuple[str, int, int, GroupedLinear]]:
    """(roles, in_features, out_features, one linear of them) of every matrix on one GPU.

    Fused sets count as one matrix; experts are left out, because kernels of their own run them. Key and value heads
    are repeated where there are fewer of them than GPUs. Sizes that do not divide are left out: heads and groups have
    their own rules.
    """
    sets: dict[tuple, list[GroupedLinear]] = {}
    for linear in layout.linears:
        if linear.expert is not None:
            continue
        fused = next((group for group in FUSED if linear.role in group), (linear.role,))
        parent = linear.name.rpartition(".")[0] if len(fused) > 1 else linear.name
        sets.setdefault((parent, fused), []).append(linear)
    found = []
    for members in sets.values():
        row = members[0].role in ROW_PARALLEL
        width, height = members[0].in_features, 0
        for linear in members:
            copies = min(tp, n_kv_heads) if linear.role in ("k", "v") and n_kv_heads else tp
            share, rest = divmod(linear.out_features, 1 if row else copies)
            height += share if not rest else 0
        if width % (tp if row else 1) == 0 and height:
            roles = sorted(
                (m.role for m in members),
                key=lambda role: _ORDER.index(role) if role in _ORDER else 0,
            )
            found.append(("+".join(roles), width // (tp if row else 1), height, members[0]))
    return found
