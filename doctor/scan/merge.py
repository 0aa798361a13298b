"""Whether a merged checkpoint is its base plus its adapter: W' against W + scale * B @ A, linear by linear.

A merge that went wrong loads and answers: the adapter was never added, was added twice, or with another scale. The
right result is computed here as PEFT does, in float32 and rounded once to the merged file's type; codes may be one
apart, because a merge in 16 bits rounds the product first. One linear of each file is in memory at a time.

Source: huggingface/peft src/peft/tuners/lora/layer.py (get_delta_weight), variants.py (DoraLinearVariant.merge_safe).
"""

from collections.abc import Callable, Mapping

from doctor.checkpoint.codecs import from_codes, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.records import MergedLinear, MergeProof
from doctor.model.lora import ADAPTER, NotMergeable, Pair, pairs, product, saved_whole

ROUNDED = 2.0**-7  # of the change: what a product in 16 bits may be off by
SLAB = 16 << 20
FLOATS = ("F32", "F16", "BF16")


def prove_merge(
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Checkpoint,
    progress: Callable[[int], None] = lambda done: None,
) -> MergeProof:
    """What became of each matrix of the adapter in `merged`, and what changed that the adapter does not touch.

    progress gets the bytes of `merged` that were read. What forbids the comparison is the record's reason.
    """
    config = adapter.value(ADAPTER)
    if not isinstance(config, Mapping):
        return MergeProof(reason=_("{path} holds no {file}", path=adapter.name, file=ADAPTER))
    try:
        found, whole = pairs(config, adapter.tensors, adapter.tensors), saved_whole(config)
    except NotMergeable as error:
        return MergeProof(reason=str(error))
    own = {pair.module: _name(pair.module, base) for pair in found}
    lost = [pair.module for pair in found if own[pair.module] is None]
    if lost or not found:
        return MergeProof(
            reason=_("{name} of the adapter is in no file of the base", name=lost[0] if lost else "nothing")
        )
    linears, touched = [], set()
    for pair in found:
        name = own[pair.module] or ""
        touched.add(name)
        linears.append(_linear(name, pair, merged, base, adapter))
        progress(merged.tensors[name].nbytes if name in merged.tensors else 0)
    changed = []
    for name, info in base.tensors.items():
        if name in touched or name not in merged.tensors or any(f".{part}." in f".{name}" for part in whole):
            continue
        if not _same(name, merged, base):
            changed.append(name)
        progress(info.nbytes)
    return MergeProof(base.name, adapter.name, tuple(linears), tuple(changed))


def _name(module: str, base: Checkpoint) -> str | None:
    """The base's weight of an adapter's module: its own name, or the only one that ends in it."""
    if f"{module}.weight" in base.tensors:
        return f"{module}.weight"
    same = [
        name for name in base.tensors if name.endswith(f".{module}.weight") or f".{module}.weight".endswith(f".{name}")
    ]
    return same[0] if len(same) == 1 else None


def _linear(name: str, pair: Pair, merged: Checkpoint, base: Checkpoint, adapter: Checkpoint) -> MergedLinear:
    info, before = merged.tensors.get(name), base.tensors[name]
    if info is None or info.shape != before.shape or before.shape != product(pair, adapter.tensors):
        return MergedLinear(name, problem=_("its shape is not that of the base and the adapter"))
    if info.dtype.name not in FLOATS or before.dtype.name not in FLOATS:
        return MergedLinear(name, problem=_("stored in {dtype}, not in floats", dtype=info.dtype.name))
    codes = merged.load(name)
    old, new = from_codes(base.load(name), before.dtype.name), from_codes(codes, info.dtype.name)
    a, b = (from_codes(adapter.load(n), adapter.tensors[n].dtype.name) for n in (pair.a, pair.b))
    added = (np.float32(pair.scale) * (b @ a)).astype(np.float32)
    added = added.T if pair.transposed else added
    whole = old + added
    if pair.magnitude:
        size = from_codes(adapter.load(pair.magnitude), adapter.tensors[pair.magnitude].dtype.name)
        axis = 0 if pair.transposed else 1
        whole = whole * np.expand_dims(size / np.linalg.norm(whole, axis=axis), axis)
    change = whole - old
    length = float(np.vdot(change, change))
    share = float(np.vdot(new - old, change)) / length if length else float("nan")
    right = to_codes(whole.astype(np.float32), info.dtype.name)
    close = np.abs(_ordered(codes) - _ordered(right)) <= 1
    close |= np.abs(new - from_codes(right, info.dtype.name)) <= np.abs(change) * ROUNDED
    return MergedLinear(name, share=share, apart=float((~close).mean()), unchanged=bool((new == old).all()))


def _same(name: str, merged: Checkpoint, base: Checkpoint) -> bool:
    """Whether a tensor that no adapter touches is the base's, rounded to the type of the merged file."""
    here, there = merged.tensors[name], base.tensors[name]
    if here.shape != there.shape:
        return False
    if here.dtype.name != there.dtype.name and not {here.dtype.name, there.dtype.name} <= {*FLOATS}:
        return False
    bytes_of_row = [max(info.nbytes // max(info.shape[0] if info.shape else 1, 1), 1) for info in (here, there)]
    rows = max(SLAB // max(bytes_of_row), 1)
    slabs = (side.rows(name, rows * size) for side, size in zip((merged, base), bytes_of_row, strict=True))
    for new, old in zip(*slabs, strict=True):
        same_type = here.dtype.name == there.dtype.name
        right = old if same_type else to_codes(from_codes(old, there.dtype.name), here.dtype.name)
        if new.tobytes() != right.tobytes():
            return False
    return True


def _ordered(codes):
    """Codes as integers i64 in the order of the numbers that they stand for."""
    bits = codes.dtype.itemsize * 8
    unsigned = codes.view(f"u{codes.dtype.itemsize}").astype(np.int64)
    sign = 1 << (bits - 1)
    return np.where(unsigned >= sign, sign - unsigned, unsigned)
