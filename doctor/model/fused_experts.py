"""Experts that lie in one tensor, taken apart into the linears that a quantized checkpoint has in their place.

The table `stacks` says how a family's two stacks lie and what engines call the linears. Whether those of a block are
taken apart depends on the plan: on whether an engine reads the family's linears in its format, on their sizes, on what
is to stay in 16 bits. An engine computes an expert's linears in one kernel, so a block's stacks come apart together or
not at all.

`take_apart` is a view: headers change at once, bytes are cut out of the stack when a linear is loaded, one expert at a
time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from doctor.checkpoint.directory import Checkpoint, codes
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import fact
from doctor.core.lazy_numpy import np
from doctor.core.recipe import ASKED, Recipe, is_kept, unfit
from doctor.model.spec import Linear, ModelSpec, stacks_of

ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class Cut:
    """One tensor inside a stack: outputs [begin, end) of expert `expert`.

    in_first: the expert's part of the stack lies [in, out]. A bias has one axis and no such order.
    """

    stack: str
    expert: int
    in_first: bool
    begin: int
    end: int

    def of(self, part: np.ndarray) -> np.ndarray:
        """The tensor, [out, in] or [out], from the codes of one expert in the stack."""
        rows = part.T if self.in_first and part.ndim == 2 else part
        return np.ascontiguousarray(rows[self.begin : self.end])


@dataclass(frozen=True)
class Stacks:
    """The two stacks of one block. why: why they stay in 16 bits, "" where they are taken apart."""

    block: int
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...]
    cuts: Mapping[str, Cut]  # by the name of the new tensor
    why: str

    @property
    def module(self) -> str:
        """What engines call the module that holds the experts."""
        return self.linears[0].name.rpartition(".0.")[0]


def find_stacks(spec: ModelSpec, tensors: Mapping[str, TensorInfo], recipe: Recipe) -> tuple[Stacks, ...]:
    """Stacks of the blocks of a model whose family the table has; () where none are stored. Shapes that do not fit are
    left out.
    """
    found = []
    for entry in stacks_of(spec.model_type):
        tail = re.compile(rf"^(?P<block>(?:\w+\.)*?layers\.(?P<i>\d+)\.){re.escape(entry['gate_up'])}$")
        own = []
        for name in tensors:
            match = tail.match(name)
            if match and match["block"] + entry["down"] in tensors:
                own += _of_block(entry, spec, tensors, recipe, match["block"], int(match["i"]))
        found += _alike(own, recipe) if entry.get("in_all_blocks") else own
    return tuple(found)


def _alike(found: list[Stacks], recipe: Recipe) -> list[Stacks]:
    """All taken apart or none, where an engine reads no other: linears that stay in 16 bits can do so apart, by their
    own names.
    """
    staying = [s for s in found if s.why]
    if not staying or len(staying) == len(found):
        return found
    if all(is_kept(recipe, x.name) for s in staying for x in s.linears):
        return [replace(s, why="") for s in found]
    return [
        replace(
            s, why=s.why or f"those of block {staying[0].block} stay, and vLLM reads stacks in all blocks or in none"
        )
        for s in found
    ]


def _of_block(
    entry: dict, spec: ModelSpec, tensors: Mapping[str, TensorInfo], recipe: Recipe, prefix: str, block: int
) -> Iterable[Stacks]:
    gate_up, down = (tensors[prefix + entry[role]] for role in ("gate_up", "down"))
    flip = slice(None, None, -1 if entry["in_first"] else 1)
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        return
    (both, hidden), (out, inner) = gate_up.shape[1:][flip], down.shape[1:][flip]
    if (
        both != 2 * inner
        or hidden != out
        or gate_up.shape[0] != down.shape[0]
        or not (gate_up.dtype.is_float and down.dtype.is_float)
    ):
        return
    biases = {s.name: tensors.get(f"{s.name}_bias") for s in (gate_up, down)} if entry["biases"] else {}
    if any(
        bias is None or bias.shape != (stack.shape[0], stack.shape[2 if entry["in_first"] else 1])
        for stack, bias in zip((gate_up, down), biases.values())
    ):
        return
    ends = {"gate": (0, inner), "up": (inner, both), "down": (0, out)}
    linears, cuts = [], {}
    for expert in range(gate_up.shape[0]):
        for role in ROLES:
            name = prefix + entry["linear"].format(e=expert, role=role)
            stack = down if role == "down" else gate_up
            size = (inner, hidden) if role == "down" else (hidden, inner)
            linears.append(Linear(name, f"{name}.weight", role, block, *size, expert=expert))
            cuts[f"{name}.weight"] = Cut(stack.name, expert, entry["in_first"], *ends[role])
            if biases:
                cuts[f"{name}.bias"] = Cut(f"{stack.name}_bias", expert, False, *ends[role])
    stored = tuple(dict.fromkeys(cut.stack for cut in cuts.values()))
    yield Stacks(block, stored, tuple(linears), cuts, _why_whole(entry, recipe, linears, (gate_up.name, down.name)))


def _why_whole(entry: dict, recipe: Recipe, linears: list[Linear], stored: tuple[str, ...]) -> str:
    """Why the plan leaves a block's stacks as they are, "" where it takes them apart."""
    if any(is_kept(recipe, name) for name in stored) or all(is_kept(recipe, x.name) for x in linears):
        return ASKED
    model, readers = entry["models"][0], entry["read_by"].get(recipe.output_format, [])
    if not readers:
        return f"no engine is known to read {model} experts as {recipe.output_format} linears: {entry['why_not']}"
    if recipe.runtime and recipe.runtime not in readers:
        return f"{recipe.runtime} is not known to read {model} experts as {recipe.output_format} linears, {' and '.join(readers)} can: {entry['why_not']}"
    return next(
        (
            f"{x.role} of an expert: {why}"
            for x in linears[: len(ROLES)]
            if (why := unfit(recipe, x.in_features, x.out_features))
        ),
        "",
    )


@fact("checkpoint", stage="header")
def stacks(checkpoint, spec, tensors, recipe) -> tuple[Stacks, ...]:
    """Experts that lie in one tensor, and whether the plan takes them apart (tuple of Stacks)."""
    return find_stacks(spec, tensors, recipe)


def take_apart(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint as the quantizer sees it, with linears in the place of stacks that are taken apart, and its
    spec.
    """
    found = [s for s in find_stacks(spec, checkpoint.tensors, recipe) if not s.why]
    if not found:
        return checkpoint, spec
    linears = [x for s in found for x in s.linears]
    gone = {name for s in found for name in s.tensors}
    view = Separated(checkpoint, {name: cut for s in found for name, cut in s.cuts.items()}, gone)
    biases = {name for s in found for name in s.cuts if name.endswith(".bias")}
    return view, replace(spec, linears=(*spec.linears, *linears), biases=(spec.biases - gone) | biases)


class Separated:
    """A Checkpoint's reading interface in which stacks are gone and their cuts stand in their place."""

    def __init__(self, source: Checkpoint, cuts: Mapping[str, Cut], gone: set[str]):
        self.source, self._cuts, self._gone = source, cuts, gone
        self._last: tuple[tuple[str, int], np.ndarray] | None = None  # gate and up lie in one part: read once

    def __getattr__(self, name):
        return getattr(self.source, name)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Headers. begin and end of a cut say how many bytes it has, not where they stand."""
        inside: dict[str, list[str]] = {}
        for name, cut in self._cuts.items():
            inside.setdefault(cut.stack, []).append(name)
        found = {}
        for name, info in self.source.tensors.items():
            if name not in self._gone:
                found[name] = info
            for new in inside.get(name, ()):
                found[new] = self._info(new, info)
        return found

    def _info(self, name: str, stack: TensorInfo) -> TensorInfo:
        cut, shape = self._cuts[name], stack.shape[1:]
        if cut.in_first:
            shape = shape[::-1]
        shape = (cut.end - cut.begin, *shape[1:])
        size = stack.nbytes // stack.numel * math.prod(shape)
        return stack._replace(name=name, shape=shape, begin=stack.begin, end=stack.begin + size)

    def load(self, name: str) -> np.ndarray:
        """Raw codes of one tensor in its shape."""
        cut = self._cuts.get(name)
        return self.source.load(name) if cut is None else cut.of(self._part(cut.stack, cut.expert))

    def _part(self, stack: str, expert: int) -> np.ndarray:
        """Codes of one expert's part of a stack. Kept until another is asked for; a second thread may read the same
        part once more.
        """
        last = self._last
        if last is not None and last[0] == (stack, expert):
            return last[1]
        info = self.source.tensors[stack]
        size = info.nbytes // info.shape[0]
        raw = bytearray(size)
        with self.source.open_file(info.shard) as file:
            file.read_into(info.begin + expert * size, memoryview(raw))
        part = codes(raw, info._replace(shape=info.shape[1:]))
        self._last = (stack, expert), part
        return part
