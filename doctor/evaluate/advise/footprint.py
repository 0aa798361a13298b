"""Bytes on one GPU while a model is served: weights, cache, and what the engine takes beside them.

weights  linears, embeddings and the output head are cut over the GPUs; k and v are copied where there are fewer heads
         than GPUs; norms, routers and whatever else has no rule here are counted whole on each GPU; where GPUs share
         linears, latent attention holds kv_b in 16 bits beside what is stored (vllm-project/vllm 0.32.0
         model_executor/layers/attention/mla_attention.py, W_UK_T and W_UV)
cache    layout.py, cut over the key/value heads; latent attention keeps one vector for all heads on each GPU
step     tokens of one step x 2 bytes x (4 hidden sizes + 2 of the widest product) + float32 logits of its sequences,
         twice: an estimate from above of what a forward holds
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.recipe import Recipe
from doctor.evaluate.advise.advice import Engine
from doctor.evaluate.advise.kinds import Kinds
from doctor.evaluate.kvcache.layout import CacheLayout
from doctor.evaluate.kvcache.schemes import Scheme as CacheScheme
from doctor.formats.gguf import blocks_of
from doctor.formats.registry import format_of
from doctor.model.fused_experts import find_fused_experts
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.plan.mixture import experts_of
from doctor.plan.sizes import fits
from doctor.quant.budget import outer_bytes

GIB = 1 << 30
_WHOLE = frozenset({"q_a", "kv_a"})  # engines hold these latent projections whole on each GPU


def weights(kinds: Kinds, spec: ModelSpec, recipe: Recipe | None, gpus: int, split: str) -> tuple[int, float, int]:
    """(bytes on one GPU, bits a weight, bytes in all) of a model whose linears a recipe quantizes; None takes what is
    stored. spec: of the plain numbers, where that is codes.
    """
    if recipe is None and kinds.file_bytes is not None:
        whole = kinds.file_bytes
        return _share(whole, gpus), 8 * whole / max(kinds.numel, 1), whole
    linears = {x.tensor: x for x in spec.linears if x.block is not None}
    apart: dict[str, tuple[Linear, ...]] = {}
    if recipe is not None:
        for found in find_fused_experts(spec, kinds.view.tensors, recipe):
            if not found.why:
                stored = [name for name in found.tensors if name in kinds.view.tensors]
                apart |= {name: found.linears if name == stored[0] else () for name in stored}
    here = whole = 0
    absorbed: set[str] = set()
    for name, info in kinds.view.tensors.items():
        times = kinds.times[name]
        if name in apart:
            part = sum(_linear_bytes(x, recipe, spec) for x in apart[name])
            here, whole = here + times * _share(part, gpus), whole + times * part
            continue
        linear = linears.get(kinds.weight_of.get(name, name))
        if linear is not None and recipe is not None:
            nbytes = _linear_bytes(linear, recipe, spec)
        else:
            nbytes = info.nbytes if name in kinds.weight_of else _plain_bytes(info, kinds, recipe)
        cut = 1 if split == "layers" else _cut(linear, name, info.shape, spec, gpus)
        here, whole = here + times * _share(nbytes, cut), whole + times * nbytes
        if linear is not None and linear.role == "kv_b" and split == "tensor" and linear.name not in absorbed:
            absorbed.add(linear.name)
            here += times * _share(2 * linear.in_features * linear.out_features, cut)
    if split == "layers":
        here = _share(whole, gpus)
    return here, 8 * whole / max(kinds.numel, 1), whole


def _linear_bytes(linear: Linear, recipe: Recipe | None, spec: ModelSpec) -> int:
    """Of a linear; in a mixture of types, of the mean over the layers."""
    assert recipe is not None
    form, scheme = format_of(recipe), recipe.for_linear(linear.name).scheme
    if not form.in_blocks:
        return form.bytes(linear.in_features, linear.out_features, scheme)
    layers, sharing = spec.n_layers or 1, (spec.n_heads or 1) // max(spec.n_kv_heads or 1, 1)
    experts, own = experts_of(spec), blocks_of(recipe).own_bits
    bits = Counter(own(recipe.bits, linear.role, i, layers, sharing, experts) for i in range(layers))
    sizes = (n * form.bytes(linear.in_features, linear.out_features, scheme._replace(bits=b)) for b, n in bits.items())
    return round(sum(sizes) / layers)


def _plain_bytes(info: TensorInfo, kinds: Kinds, recipe: Recipe | None) -> int:
    """Of a tensor that no recipe quantizes, as an engine loads it: 16 bits, or the outer type of a GGUF file."""
    if recipe is not None and format_of(recipe).in_blocks and len(info.shape) == 2:
        return outer_bytes(info, kinds.view, recipe)
    return info.nbytes // 2 if info.dtype.is_float and info.dtype.bits == 32 else info.nbytes


def _cut(linear: Linear | None, name: str, shape: tuple[int, ...], spec: ModelSpec, gpus: int) -> int:
    """Over how many GPUs a tensor is cut."""
    if linear is not None:
        if linear.role in ("k", "v") and spec.n_kv_heads:
            return min(gpus, spec.n_kv_heads)
        return 1 if linear.role in _WHOLE else gpus
    if name in (spec.embed_tensor, spec.head_tensor):
        return gpus
    return gpus if len(shape) >= 3 else 1  # fused experts


def _share(nbytes: int, gpus: int) -> int:
    return -(-nbytes // gpus)


def cache_bytes(
    layout: CacheLayout, scheme: CacheScheme, context: int, batch: int, spec: ModelSpec, gpus: int, split: str
) -> float:
    """Of the cache on one GPU."""
    return layout.total_bytes(scheme, context, batch) / cache_share(layout, spec, gpus, split)


def cache_share(layout: CacheLayout, spec: ModelSpec, gpus: int, split: str) -> int:
    """Over how many GPUs a cache is cut."""
    if split == "layers":
        return gpus
    if any(layer.kind == "latent" for layer in layout.layers):
        return 1
    return min(gpus, spec.n_kv_heads or gpus)


def engine_of(entry: dict[str, Any], memory: int, context: int, spec: ModelSpec, gpus: int) -> Engine:
    """What an engine takes of a GPU of so many bytes, by its row of the table of engines."""
    tokens = _below(entry["tokens"], memory) or context
    tokens = min(tokens, context) if spec.max_positions is None else min(tokens, max(context, 1))
    hidden, widest = spec.hidden or 0, _widest(spec) // (gpus if entry["split"] == "tensor" else 1)
    sequences = min(_below(entry["sequences"], memory), tokens)
    step = 2 * tokens * (4 * hidden + 2 * widest) + 8 * sequences * (spec.vocab or 0)
    return Engine(memory, int(memory * entry["share"]), int(entry["context_mib"]) << 20, step, tokens)


def _widest(spec: ModelSpec) -> int:
    """Out-features of the widest product of a layer: gate and up together, or q, k and v."""
    rows: dict[tuple[int | None, str], int] = {}
    for x in spec.linears:
        if x.block is not None and x.expert in (None, 0):
            group = "mlp" if x.role in ("gate", "up", "gate_up") else "qkv" if x.role in ("q", "k", "v") else x.role
            rows[x.block, group] = rows.get((x.block, group), 0) + fits(x.out_features, 1)
    return max(rows.values(), default=0)


def _below(steps: list[list[int]], memory: int) -> int:
    return next(value for gib, value in steps if memory < gib * GIB)
