"""Which linears of a decoder layer share an input, and in which order they compute.

Found in one forward of one batch, not looked up.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from doctor.model.linears import Linear
from doctor.quant.forward.held_storages import HeldStorages
from doctor.quant.forward.layer_call import LayerCall
from doctor.quant.forward.skeleton import Skeleton

Modules = dict[str, tuple[Linear, nn.Module]]  # by checkpoint name: a linear and the module that holds its weight
Stages = list[list[list[str]]]  # in the order of computing: groups of names of linears that share an input


@dataclass(frozen=True)
class LinearGroups:
    """Stages of groups of linears that share an input; linears as positions in the layer's list of them.

    suspended_bytes: bytes per token that a suspended forward holds.
    """

    groups: tuple[tuple[tuple[int, ...], ...], ...]
    suspended_bytes: float

    def names(self, names: list[str]) -> Stages:
        """The same with the names of the layer's linears."""
        return [[[names[k] for k in group] for group in stage] for stage in self.groups]


def discover(
    skeleton: Skeleton, i: int, hidden: torch.Tensor, call: LayerCall, modules: Modules, tokens: int
) -> LinearGroups:
    """One forward of hidden states of so many tokens through layer i: which linear reads what, when, and what is held
    meanwhile.
    """
    groups: list[tuple[weakref.ref[torch.Tensor], list[str]]] = []
    held, most = HeldStorages(), 0

    def arrived(name: str, x: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(storage.nbytes() for storage in held.storages().values()))
        members = next((members for ref, members in groups if ref() is x), None)
        if members is None:
            groups.append((weakref.ref(x), members := []))
        if name not in members:
            members.append(name)

    hooks = [
        module.register_forward_pre_hook(lambda mod, args, name=name: arrived(name, args[0]))
        for name, (_linear, module) in modules.items()
    ]
    try:
        with held:
            skeleton.run_layer(i, hidden, call, carry=False)
    finally:
        for hook in hooks:
            hook.remove()
    stages = arrange([members for _ref, members in groups], {n: linear for n, (linear, _module) in modules.items()})
    at = {name: k for k, name in enumerate(modules)}
    return LinearGroups(
        tuple(tuple(tuple(at[name] for name in group) for group in stage) for stage in stages),
        most / tokens,
    )


def arrange(groups: list[list[str]], linears: dict[str, Linear]) -> Stages:
    """Groups into stages: each group its own, except that experts' groups of one kind share a stage.

    groups: linears that got the same tensor, in the order of computing. Experts that no row reached join the stage of
    their kind; where none was reached, they come last, each linear alone.
    """
    stages: list[tuple[frozenset[str], list[list[str]]]] = []
    for group in groups:
        kind = frozenset(_kind(linears[name]) for name in group)
        same = next((s for s in stages if s[0] == kind and linears[group[0]].expert is not None), None)
        if same:
            same[1].append(group)
        else:
            stages.append((kind, [group]))
    placed = {name for group in groups for name in group}
    missing: dict[tuple[frozenset[str], int | None], list[str]] = {}
    for name, linear in linears.items():
        if name not in placed:
            kind = next((k for k, _ in stages if _kind(linear) in k), frozenset({_kind(linear)}))
            missing.setdefault((kind, linear.expert), []).append(name)
    for (kind, _expert), group in missing.items():
        same = next((s for s in stages if s[0] == kind), None)
        if same:
            same[1].append(group)
        else:
            stages.append((kind, [group]))
    return [groups for _, groups in stages]


def in_turn(stages: Stages, linears: dict[str, Linear], together: set[str], at_once: int) -> Stages:
    """The stages with experts `at_once` at a time, each time in the order of computing.

    together: names of the linears whose module takes its experts so (expert_modules.py).
    """

    def owner(stage: list[list[str]]) -> str:
        if any(name not in together for group in stage for name in group):
            return ""
        return _kind(linears[stage[0][0]]).partition(".*.")[0]

    found: Stages = []
    for name, run in groupby(stages, owner):
        if not name:
            found += run
            continue
        parts: dict[int, Stages] = {}
        for stage in run:
            chunks: dict[int, list[list[str]]] = {}
            for group in stage:
                chunks.setdefault((linears[group[0]].expert or 0) // at_once, []).append(group)
            for number, chunk in chunks.items():
                parts.setdefault(number, []).append(chunk)
        found += [stage for number in sorted(parts) for stage in parts[number]]
    return found


def _kind(linear: Linear) -> str:
    """A linear's name without the number of its expert."""
    return linear.name if linear.expert is None else ".*.".join(linear.name.rsplit(f".{linear.expert}.", 1))
