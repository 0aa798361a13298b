"""What a report says about the files in one line: architecture, parameters, dtype, shards, bytes."""

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.formats.base import KNOWN
from doctor.model.directory_kind import directory_kind
from doctor.model.quantization_config import stored_recipe
from doctor.plan.groups import LAYOUT
from doctor.scan.header import SPEC


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
        names = {
            n.rpartition(".")[0]: form.scales
            for form in KNOWN.values()
            for n in tensors
            if form.words and n.endswith(f".{form.words}")
        }
        scales = {module: tensors.get(f"{module}.{tail}") for module, tail in names.items()}
        packed = {module: info.numel * group for module, info in scales.items() if info is not None and group > 0}
    rest = sum(
        t.numel for name, t in tensors.items() if name.endswith(".bias") or name.rpartition(".")[0] not in packed
    )
    return rest + sum(packed.values())


def summary(checkpoint: Checkpoint, store: Store) -> dict:
    """What the second line of every report says about the files."""
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
    }
