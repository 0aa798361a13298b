"""What feeds a group of linears for AWQ: the norm, v (for o) or up (for down) that its scales can be folded into.

rules/tables/architectures/ says where that source is linear and where nothing else reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.core.messages import _
from doctor.core.tables import family as family_table
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.model.templates import condition, exists

_PLAIN, _PLUS_ONE = "weight * xhat", "(1 + weight) * xhat"


@dataclass(frozen=True)
class Source:
    """What a group of linears reads from. kind: norm, norm+1 (stored as weight - 1) or rows (of a linear); tensor: its
    weight.

    repeat: times that each head of v appears side by side in o's input; head: its width (1 and the whole width
    otherwise). A norm that every head has in common is a source of one head.
    """

    kind: str
    tensor: str
    repeat: int = 1
    head: int = 0

    def spread(self, s: torch.Tensor) -> torch.Tensor:
        """Factors of the source's channels to factors of the linear's columns."""
        return s if self.repeat == 1 else s.reshape(-1, 1, self.head).repeat(1, self.repeat, 1).reshape(-1)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the columns that one channel of the source feeds."""
        return values if self.repeat == 1 else values.reshape(-1, self.repeat, self.head).amax(1).reshape(-1)

    def gather(self, energy: torch.Tensor) -> torch.Tensor:
        """Mean over the columns that one channel of the source feeds."""
        return energy if self.repeat == 1 else energy.reshape(-1, self.repeat, self.head).mean(1).reshape(-1)


def source_of(spec: ModelSpec, group: list[Linear], quantized: dict[str, Linear]) -> tuple[Source | None, str]:
    """(source, "") of linears that share an input, or (None, why no scaling is possible)."""
    entry = family_table(spec.family)
    first = group[0]
    assert first.block is not None  # only linears of decoder layers are quantized
    here = [
        t for t in entry.get("tensor", ()) if "role" in t and spec.in_layer(t.get("layers"), first.block) is not False
    ]
    entries = {item["role"]: item for item in here}
    linearity = entry.get("linear_paths", ())
    if first.role in ("o", "down"):
        return _rows_before(spec, first, linearity, quantized) if len(group) == 1 else (None, _("it shares its input"))
    norms = {entries.get(x.role, {}).get("norm_before") for x in group}
    norm = norms.pop() if len(norms) == 1 else None
    if norm is None:
        return None, _("no norm is known to feed it alone")
    readers = [
        item
        for item in here
        if item.get("norm_before") == norm and exists(condition(item), entry["defaults"] | spec.config)
    ]
    if (
        any("{e}" in item["name"] or item["role"] not in {x.role for x in group} for item in readers)
        or first.expert is not None
    ):
        return None, _("its norm feeds other linears too")
    own: dict = next((t for t in entry["tensor"] if t["name"].endswith(f".{{i}}.{norm}.weight")), {})
    kind = {_PLAIN: "norm", _PLUS_ONE: "norm+1"}.get(own.get("norm", entry["norm"]))
    if kind is None:
        return None, _("how its norm applies a weight is not known")
    before, _dot, _rest = first.tensor.partition(f".{first.block}.")
    return Source(kind, f"{before}.{first.block}.{norm}.weight"), ""


def _rows_before(
    spec: ModelSpec, linear: Linear, linearity: list[str], quantized: dict[str, Linear]
) -> tuple[Source | None, str]:
    role, pair = ("v", "v->o") if linear.role == "o" else ("up", "up->down")
    parent = linear.name.rpartition(".")[0]
    source = next(
        (
            x
            for x in quantized.values()
            if x.role == role and x.expert == linear.expert and x.name.rpartition(".")[0] == parent
        ),
        None,
    )
    if pair not in linearity or source is None:
        return None, _("{pair} is not linear here, or {role} is no separate quantized linear", pair=pair, role=role)
    if source.out_features == linear.in_features:
        return Source("rows", source.tensor), ""
    if (
        role != "v"
        or not spec.head_dim
        or source.out_features % spec.head_dim
        or linear.in_features % source.out_features
    ):
        return None, _(
            "{role} has {rows} rows for {columns} columns",
            role=role,
            rows=source.out_features,
            columns=linear.in_features,
        )
    return Source("rows", source.tensor, linear.in_features // source.out_features, spec.head_dim), ""
