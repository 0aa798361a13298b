"""The record of one linear: its facts in the store, and its line in the report and the journal."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from doctor.core.recipe import Recipe
from doctor.core.records import HESSIAN, SOLVE, HessianFacts, SolveRecord
from doctor.core.store import Store
from doctor.model.linears import Linear

FUSED_EXPERTS = "experts"  # the role of a 3-D tensor of experts in a record
Record = dict[str, Any]  # name, block (number of the decoder layer), role, sizes, outcome, solve, hessian, seconds


def kept(recipe: Recipe, reason: str) -> SolveRecord:
    """The outcome of a linear that stays in 16 bits."""
    return SolveRecord("kept", recipe.damp, 0.0, "", 0.0, 0.0, (), reason)


def failed(recipe: Recipe, reason: str) -> SolveRecord:
    """The outcome of a linear that cannot be quantized."""
    return SolveRecord("failed", recipe.damp, 0.0, "", math.nan, math.nan, (), reason)


def put_facts(store: Store, name: str, solved: SolveRecord, hessian: HessianFacts | None) -> None:
    """What rules judge of a linear."""
    store.put(SOLVE, solved, f"linear:{name}")
    if hessian is not None:
        store.put(HESSIAN, hessian, f"linear:{name}")


def record(linear: Linear, solved: SolveRecord, hessian: HessianFacts | None, seconds: float) -> Record:
    """A linear's line of the report, as JSON but for non-finite numbers."""
    return {
        "name": linear.name,
        "block": linear.block,
        "role": linear.role,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "outcome": solved.outcome,
        "solve": asdict(solved),
        "hessian": None if hessian is None else asdict(hessian),
        "seconds": round(seconds, 3),
    }


def solve_of(found: Record) -> SolveRecord:
    """The outcome of a record that was read from the journal."""
    return SolveRecord(**{**found["solve"], "attempts": tuple(tuple(a) for a in found["solve"]["attempts"])})


def hessian_of(found: Record) -> HessianFacts | None:
    """The Hessian's facts of a record that was read from the journal."""
    data = found["hessian"]
    if data is None:
        return None
    first = data["first_nonfinite"]
    return HessianFacts(**{**data, "first_nonfinite": tuple(first) if first else None})
