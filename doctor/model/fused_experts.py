"""Fused experts: all experts of a decoder layer in two 3-D tensors, unfused into the linears of single experts.

rules/tables/stacks.toml says how a family's fused tensors are laid out and what engines call the linears. Whether a
layer's experts are unfused depends on the recipe: on whether an engine reads the family's linears in its format, on
their sizes, on what stays in 16 bits. An engine computes an expert's linears in one kernel, so a layer's two tensors
are unfused together or not at all.

`unfuse` gives a view: headers change at once, bytes are sliced when a linear is loaded, one expert at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from doctor.checkpoint.directory import Checkpoint, codes
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.facts import fact
from doctor.core.lazy_numpy import np
from doctor.core.messages import _, listed
from doctor.core.recipe import ASKED, Recipe, is_kept, unfit
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.model.templates import fused_layouts_of

ROLES = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertSlice:
    """One linear's tensor inside a fused one: outputs [begin, end) of expert `expert`.

    in_first: each expert is stored [in, out]. A bias has one axis and no such order.
    """

    fused: str
    expert: int
    in_first: bool
    begin: int
    end: int

    def of(self, part: np.ndarray) -> np.ndarray:
        """The tensor, [out, in] or [out], from the codes of one expert."""
        rows = part.T if self.in_first and part.ndim == 2 else part
        return np.ascontiguousarray(rows[self.begin : self.end])


@dataclass(frozen=True)
class FusedExperts:
    """The two fused tensors of one decoder layer. why: the reason why they stay in 16 bits, "" if they are unfused."""

    block: int
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...]
    slices: Mapping[str, ExpertSlice]  # by the name of the new tensor
    why: str

    @property
    def module(self) -> str:
        """The name that engines give the module of the experts."""
        return self.linears[0].name.rpartition(".0.")[0]


def holds_experts(info: TensorInfo, hidden: int | None) -> bool:
    """Whether a tensor of a decoder layer holds several experts, by its name and shape: [experts, out, in], or their
    rows one below the other in a parameter that is no linear's weight (DBRX: [experts * inner, hidden]).
    """
    name, shape = info.name, info.shape
    if not (info.dtype.is_float and re.search(r"expert|moe", name) and re.search(r"\.\d+\.", name)):
        return False
    if len(shape) == 3:
        return min(shape[1:]) >= 2
    # A router is [experts, hidden], and the biases of experts are [experts, out]: shorter than the model is wide.
    return len(shape) == 2 and not name.endswith(("weight", "bias")) and hidden is not None and min(shape) >= hidden


def experts_held(info: TensorInfo, why: str) -> str:
    """Why a tensor that holds experts stays in 16 bits, with its shape."""
    if len(info.shape) == 2:
        return _("experts in one tensor {shape}; {why}", shape=list(info.shape), why=why)
    return _("{n} experts in one tensor {shape}; {why}", n=info.shape[0], shape=list(info.shape), why=why)


def find_fused_experts(spec: ModelSpec, tensors: Mapping[str, TensorInfo], recipe: Recipe) -> tuple[FusedExperts, ...]:
    """Fused experts of each decoder layer, for families in the table; () if there are none. Tensors whose shapes do not
    fit each other are left out.
    """
    found: list[FusedExperts] = []
    for entry in fused_layouts_of(spec.model_type):
        tail = re.compile(rf"^(?P<layer>(?:\w+\.)*?layers\.(?P<i>\d+)\.){re.escape(entry['gate_up'])}$")
        own: list[FusedExperts] = []
        for name in tensors:
            match = tail.match(name)
            if match and match["layer"] + entry["down"] in tensors:
                own += _of_layer(entry, spec, tensors, recipe, match["layer"], int(match["i"]))
        found += _alike(own, recipe) if entry.get("in_all_blocks") else own
    return tuple(found)


def _alike(found: list[FusedExperts], recipe: Recipe) -> list[FusedExperts]:
    """All layers unfused or none, where engines read nothing else. Linears that the user keeps in 16 bits may be
    unfused.
    """
    staying = [s for s in found if s.why]
    if not staying or len(staying) == len(found):
        return found
    if all(is_kept(recipe, x.name) for s in staying for x in s.linears):
        return [replace(s, why="") for s in found]
    return [
        replace(
            s,
            why=s.why
            or _(
                "those of decoder layer {layer} stay fused, and vLLM reads fused experts in all layers or in none",
                layer=staying[0].block,
            ),
        )
        for s in found
    ]


def _of_layer(
    entry: dict, spec: ModelSpec, tensors: Mapping[str, TensorInfo], recipe: Recipe, prefix: str, block: int
) -> Iterable[FusedExperts]:
    gate_up, down = (tensors[prefix + entry[role]] for role in ("gate_up", "down"))
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        return
    in_first = bool(entry["in_first"])
    both, hidden = gate_up.shape[:0:-1] if in_first else gate_up.shape[1:]
    out, inner = down.shape[:0:-1] if in_first else down.shape[1:]
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
        for stack, bias in zip((gate_up, down), biases.values(), strict=False)
    ):
        return
    ends = {"gate": (0, inner), "up": (inner, both), "down": (0, out)}
    linears: list[Linear] = []
    slices: dict[str, ExpertSlice] = {}
    for expert in range(gate_up.shape[0]):
        for role in ROLES:
            name = prefix + entry["linear"].format(e=expert, role=role)
            stack = down if role == "down" else gate_up
            size = (inner, hidden) if role == "down" else (hidden, inner)
            linears.append(Linear(name, f"{name}.weight", role, block, *size, expert=expert))
            slices[f"{name}.weight"] = ExpertSlice(stack.name, expert, entry["in_first"], *ends[role])
            if biases:
                slices[f"{name}.bias"] = ExpertSlice(f"{stack.name}_bias", expert, False, *ends[role])
    stored = tuple(dict.fromkeys(part.fused for part in slices.values()))
    yield FusedExperts(
        block, stored, tuple(linears), slices, _why_fused(entry, recipe, linears, (gate_up.name, down.name))
    )


def _why_fused(entry: dict, recipe: Recipe, linears: list[Linear], stored: tuple[str, ...]) -> str:
    """The reason why a layer's experts stay fused under this recipe, "" if they are unfused."""
    if any(is_kept(recipe, name) for name in stored) or all(is_kept(recipe, x.name) for x in linears):
        return ASKED
    model, readers = entry["models"][0], entry["read_by"].get(recipe.output_format, [])
    if not readers:
        return _(
            "no engine is known to read {model} experts as {format} linears: {why}",
            model=model,
            format=recipe.output_format,
            why=entry["why_not"],
        )
    if recipe.runtime and recipe.runtime not in readers:
        return _(
            "{runtime} is not known to read {model} experts as {format} linears, {readers} can: {why}",
            runtime=recipe.runtime,
            model=model,
            format=recipe.output_format,
            readers=listed(readers),
            why=entry["why_not"],
        )
    return next(
        (
            _("{role} of an expert: {why}", role=x.role, why=why)
            for x in linears[: len(ROLES)]
            if (why := unfit(recipe.for_linear(x.name), x.in_features, x.out_features))
        ),
        "",
    )


@fact("checkpoint", cost="header")
def stacks(checkpoint, spec, tensors, recipe) -> tuple[FusedExperts, ...]:
    """Experts that lie in one tensor, and whether the plan takes them apart (tuple of Stacks)."""
    return find_fused_experts(spec, tensors, recipe)


def unfuse(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> tuple[Checkpoint, ModelSpec]:
    """The checkpoint as the quantizer reads it, with the linears of single experts in place of fused tensors, and its
    spec.
    """
    found = [s for s in find_fused_experts(spec, checkpoint.tensors, recipe) if not s.why]
    if not found:
        return checkpoint, spec
    linears = [x for s in found for x in s.linears]
    gone = {name for s in found for name in s.tensors}
    view = UnfusedCheckpoint(checkpoint, {name: part for s in found for name, part in s.slices.items()}, gone)
    biases = {name for s in found for name in s.slices if name.endswith(".bias")}
    return cast("Checkpoint", view), replace(
        spec, linears=(*spec.linears, *linears), biases=(spec.biases - gone) | biases
    )


class UnfusedCheckpoint:
    """A Checkpoint's reading interface in which the linears of single experts replace the fused tensors."""

    def __init__(self, source: Checkpoint, slices: Mapping[str, ExpertSlice], gone: set[str]) -> None:
        self.source, self._slices, self._gone = source, slices, gone
        self._last: tuple[tuple[str, int], np.ndarray] | None = None  # gate and up are in one part, which is read once

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Headers. begin and end of a slice say how many bytes it has, not where they are."""
        inside: dict[str, list[str]] = {}
        for name, part in self._slices.items():
            inside.setdefault(part.fused, []).append(name)
        found = {}
        for name, info in self.source.tensors.items():
            if name not in self._gone:
                found[name] = info
            for new in inside.get(name, ()):
                found[new] = self._info(new, info)
        return found

    def _info(self, name: str, fused: TensorInfo) -> TensorInfo:
        part, shape = self._slices[name], fused.shape[1:]
        if part.in_first:
            shape = shape[::-1]
        shape = (part.end - part.begin, *shape[1:])
        size = fused.nbytes // fused.numel * math.prod(shape)
        return fused._replace(name=name, shape=shape, begin=fused.begin, end=fused.begin + size)

    def load(self, name: str) -> np.ndarray:
        """Raw codes of one tensor in its shape."""
        part = self._slices.get(name)
        return self.source.load(name) if part is None else part.of(self._part(part.fused, part.expert))

    def _part(self, fused: str, expert: int) -> np.ndarray:
        """Codes of one expert in a fused tensor. Kept until another is asked for; a second thread may read it again."""
        last = self._last
        if last is not None and last[0] == (fused, expert):
            return last[1]
        info = self.source.tensors[fused]
        size = info.nbytes // info.shape[0]
        raw = bytearray(size)
        with self.source.open_file(info.shard) as file:
            file.read_into(info.begin + expert * size, memoryview(raw))
        part = codes(raw, info._replace(shape=info.shape[1:]))
        self._last = (fused, expert), part
        return part
