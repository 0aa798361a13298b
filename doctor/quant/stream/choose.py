"""Which tensors of each shard are rounded, and which are copied: from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.messages import _
from doctor.core.recipe import Recipe, is_kept
from doctor.core.records import OUTSIDE_LINEARS, STACKED_EXPERTS
from doctor.core.store import Store
from doctor.model.fused_experts import FusedExperts, find_fused_experts, holds_experts, unfuse
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.client import Linears
from doctor.quant.records import Record, kept, record
from doctor.quant.selection import names_in_config, require_widths, stays_unasked, whole_experts, why_kept
from doctor.quant.vision import vision_linears

_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Chosen:
    """view: the checkpoint with its experts apart. rounded: tensor -> linear. kept: records of what stays in 16 bits;
    names: theirs in the output's config. shards: tensors of the view by the shard that they lie in, in order.
    """

    view: Checkpoint
    rounded: Mapping[str, Linear]
    kept: tuple[Record, ...]
    names: tuple[str, ...]
    shards: Mapping[str, tuple[TensorInfo, ...]]


def choose(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, linears: Linears, store: Store) -> Chosen:
    """linears: the client's (client.Client); where it names any, what it loads into no linear stays in 16 bits. What
    stays unasked becomes a fact of `store`. Raises DoctorError as quantize does for patterns that name nothing.
    """
    fused = {
        name.removesuffix(".weight"): stacks
        for stacks in find_fused_experts(spec, checkpoint.tensors, recipe)
        for name in stacks.tensors
    }
    view, spec = unfuse(checkpoint, spec, recipe)
    require_widths(spec, recipe)
    loaded = {source for sources in linears.values() for source in sources}
    rounded: dict[str, Linear] = {}
    staying: list[Record] = []
    outside: list[Linear] = []
    for linear in spec.linears:
        if linear.tensor not in view.tensors:
            continue
        if linear.block is None or linear.block >= (_layers(spec) or linear.block + 1):
            outside.append(linear)
            continue
        reason = why_kept(recipe, linear)
        if not reason and loaded and linear.expert is None and linear.name not in loaded:
            reason = _("transformers has no linear of its own for it")
        if not reason and view.tensors[linear.tensor].dtype.name not in _FLOATS:
            reason = _("it is stored in {dtype}", dtype=view.tensors[linear.tensor].dtype.name)
        if reason:
            staying.append(record(linear, kept(recipe, reason), None, 0.0))
        else:
            rounded[linear.tensor] = linear
    for linear in vision_linears(recipe, linears, view.tensors):
        reason = why_kept(recipe, linear)
        if reason:
            staying.append(record(linear, kept(recipe, reason), None, 0.0))
        else:
            rounded[linear.tensor] = linear
    staying += _fused(view, spec, {x.tensor for x in spec.linears}, fused, recipe)
    names = [name for found in staying for name in names_in_config(found, fused, recipe)]
    reason = _("not in a decoder layer that calibration runs through")
    staying += [record(x, kept(recipe, reason), None, 0.0) for x in outside]
    names += [x.name for x in outside]
    store.put(OUTSIDE_LINEARS, tuple(x.name for x in outside if not is_kept(recipe, x.name)))
    unasked = {r["name"]: r["solve"]["note"] for r in staying if stays_unasked(r, fused)}
    store.put(STACKED_EXPERTS, tuple(unasked.items()))
    return Chosen(view, rounded, tuple(staying), tuple(dict.fromkeys(names)), _by_shard(view.tensors.values()))


def _layers(spec: ModelSpec) -> int | None:
    """How many layers there are at most in one list of them; None if the config does not say."""
    halves = (spec.config.get(key) for key in ("encoder_layers", "decoder_layers", "num_decoder_layers"))
    stated = [n for n in (spec.n_layers, *halves) if isinstance(n, int)]
    return max(stated, default=None)


def _fused(
    view: Checkpoint, spec: ModelSpec, known: set[str], fused: Mapping[str, FusedExperts], recipe: Recipe
) -> list[Record]:
    """Records of tensors of several experts that stay whole."""
    found = []
    for name, info in view.tensors.items():
        block = re.search(r"\.(\d+)\.", name)
        if block and name not in known and holds_experts(info, spec.hidden):
            found.append(whole_experts(info, fused, recipe, int(block[1])).record)
    return found


def _by_shard(infos: Iterable[TensorInfo]) -> dict[str, tuple[TensorInfo, ...]]:
    found: dict[str, list[TensorInfo]] = {}
    for info in infos:
        found.setdefault(info.shard, []).append(info)
    return {shard: tuple(sorted(found[shard], key=lambda info: info.begin)) for shard in sorted(found)}
