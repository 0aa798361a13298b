"""What a report says about the files in one line: architecture, parameters, dtype, shards, bytes."""

from collections import Counter
from collections.abc import Iterable

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.ggml_types import FILE_TYPES
from doctor.checkpoint.gguf import GgufModel, GgufTensor
from doctor.core.collection import uncollected
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.formats.registry import KNOWN
from doctor.model.directory_kind import directory_kind
from doctor.model.quantization_config import GOAL, quantization_of, stored_recipe
from doctor.model.stored_weights import STORED_WEIGHTS
from doctor.plan.groups import LAYOUT
from doctor.plan.serving import least_capability
from doctor.scan.header import RECIPE, SPEC


def _parameters(checkpoint: Checkpoint, store: Store) -> int:
    """Weights of the model. A packed linear counts as the matrix that it stands for, not as the words it is stored
    in.
    """
    layout = store.get(LAYOUT) if store.has(LAYOUT) else None
    tensors = checkpoint.tensors
    if layout is not None and not layout.quantized:
        return sum(t.numel for t in tensors.values())
    if layout is not None:
        packed = {x.name: x.in_features * x.out_features for x in layout.linears}
    else:  # of a form that is not read: each scale stands for a group, where the group size is stated
        group = stored_recipe(checkpoint, Recipe(group_size=-1)).group_size
        scales_of = {form.words: form.scales for form in KNOWN.values() if form.words}
        parts = (n.rpartition(".") for n in tensors)
        names = {module: scales_of[tail] for module, dot, tail in parts if dot and tail in scales_of}
        scales = {module: tensors.get(f"{module}.{tail}") for module, tail in names.items()}
        packed = {module: info.numel * group for module, info in scales.items() if info is not None and group > 0}
    rest = sum(
        t.numel for name, t in tensors.items() if name.endswith(".bias") or name.rpartition(".")[0] not in packed
    )
    return rest + sum(packed.values())


def _stored(checkpoint: Checkpoint, store: Store) -> str:
    """`gptq 4-bit g128`, `fp8 8-bit 128 × 128`: how the weights are stored; "" for floats."""
    layout = store.get(LAYOUT) if store.has(LAYOUT) else None
    if layout is not None and layout.quantized:
        group = "per-channel" if layout.group_size == -1 else f"g{layout.group_size}"
        return f"{layout.format} {layout.bits}-bit {group}"
    weights = store.find(STORED_WEIGHTS) or {}
    kinds = Counter((w.format.name, w.scheme.bits, w.scheme.tile, w.scheme.group_size) for w in weights.values())
    if kinds:
        (name, bits, tile, group_size), _count = kinds.most_common(1)[0]
        shape = f" {tile[0]} × {tile[1]}" if len(tile) == 2 else f" g{group_size}" if group_size > 0 else ""
        return f"{name} {bits}-bit{shape}"
    if checkpoint.gguf:
        return _gguf_types(checkpoint.gguf[0])
    block = quantization_of(checkpoint)
    return str(block[0].get("quant_method", "")) if block and store.find(GOAL) == "serve" else ""


@uncollected()
def summary(checkpoint: Checkpoint, store: Store) -> dict:
    """What the second line of every report says about the files."""
    if checkpoint.gguf:
        return _gguf_summary(checkpoint, store)
    kinds: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        kinds[info.dtype.name] = kinds.get(info.dtype.name, 0) + info.nbytes
    spec = store.get(SPEC) if store.has(SPEC) else None
    return {
        "path": str(checkpoint.root),
        "kind": directory_kind(checkpoint),
        "architecture": spec.architecture or spec.model_type if spec else "",
        "parameters": _parameters(checkpoint, store),
        "dtype": max(kinds, key=lambda kind: kinds[kind], default=""),
        "shards": len(checkpoint.shards),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_bytes,
        "blocks": spec.n_layers if spec else None,
        "linears": len(spec.linears) if spec else 0,
        "goal": store.find(GOAL) or "quantize",
        "stored": _stored(checkpoint, store),
        "capability": _capability(checkpoint, store),
    }


def _capability(checkpoint: Checkpoint, store: Store) -> str:
    """`8.0`: the lowest compute capability with which the recipe's runtime serves what is stored; "" where unknown."""
    block = quantization_of(checkpoint)
    least = least_capability(store.get(RECIPE), block[0]) if block and store.find(GOAL) == "serve" else 0
    return f"{least / 10:.1f}" if least else ""


def gguf_bits(tensors: Iterable[GgufTensor]) -> float:
    """Bits a weight of tensors, scales and what stays in floats included."""
    tensors = list(tensors)
    return 8 * sum(t.nbytes for t in tensors) / max(sum(t.numel for t in tensors), 1)


def _gguf_types(model: GgufModel) -> str:
    """`Q4_K_M 6.30 bits a weight (166 Q5_0, 16 Q4_K)`: matrices by type, the most frequent first."""
    label = FILE_TYPES.get(model.metadata.get("general.file_type", -1), "GGUF")
    kinds = Counter(t.type.name for t in model.tensors.values() if t.type is not None and len(t.shape) > 1)
    if not kinds:
        return label
    listed = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    return f"{label} {gguf_bits(model.tensors.values()):.2f} bits a weight ({listed})"


def _gguf_summary(checkpoint: Checkpoint, store: Store) -> dict:
    models = checkpoint.gguf
    tensors = [t for model in models for t in model.tensors.values()]
    layers = models[0].own("block_count")
    return {
        "path": str(checkpoint.root),
        "kind": "gguf",
        "architecture": models[0].architecture,
        "parameters": sum(t.numel for t in tensors),
        "dtype": "",
        "shards": sum(len(model.files) for model in models),
        "tensors": len(tensors),
        "bytes": checkpoint.total_bytes,
        "blocks": layers if isinstance(layers, int) else None,
        "linears": sum(len(t.shape) > 1 for t in tensors),
        "goal": store.find(GOAL) or "serve",
        "stored": _gguf_types(models[0]),
        "types": {t.name: t.type.name if t.type else str(t.number) for t in tensors},
    }
