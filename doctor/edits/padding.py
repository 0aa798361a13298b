"""Edits that make linears fit: an MLP grown by zeros, and linears that stay in 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.messages import _
from doctor.edits.kinds import MISSING, Edit, Keep, PadTensor, SetJson
from doctor.model.spec import ModelSpec
from doctor.plan.groups import together
from doctor.plan.sizes import fits, names_in, resized

# Only an MLP's inner width can grow by zeros: every norm divides by hidden_size, and heads carry a position code.
_PADDABLE = frozenset({"gate", "up", "gate_up", "down"})


def pad_edits(spec: ModelSpec, tensors: Mapping[str, TensorInfo], key: str, value: int) -> tuple[PadTensor, ...]:
    """Zero-padding of every tensor whose shape follows config[key], to `value`; empty where it is not known to be
    exact.

    Gate and up get zero rows, down zero columns at the same places, so the new hidden units put out 0 and the sum is
    unchanged in exact arithmetic. A fused gate_up is padded in each half alike.
    """
    edits = []
    for name, info in tensors.items():
        weight = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        template = next((t for t in spec.templates if t.pattern.match(weight)), None)
        if template is None:
            continue
        expressions = template.shape
        if weight != name:
            expressions = expressions[1:] if template.transposed else expressions[:1]
        for axis, expression in enumerate(expressions[: len(info.shape)]):
            new = resized(spec, expression, key, value)
            if key not in map(spec.key_for, names_in(expression)) or new == info.shape[axis]:
                continue
            if template.role not in _PADDABLE or len(template.shape) != 2 or new is None or new < info.shape[axis]:
                return ()
            edits.append(PadTensor(name, axis, new, blocks=2 if template.role == "gate_up" else 1))
    return tuple(edits)


WIDTH_STEP = 8  # widths are sought in steps of 8: packing needs more, so no legal width is passed over


def grown(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    key: str,
    suits: Callable[[int], bool],
    period: int,
) -> tuple[str, tuple[Edit, ...]] | None:
    """(title, edits) that zero-pad all that follows config[key] to the least width that `suits`, None where no exact
    padding is known.

    period: whether a size suits depends on its remainder by this alone, so that the search ends. Sizes may be a
    fraction of the key's value, as Qwen 1 states twice its width; that makes the period as many times longer, four at
    most.
    """
    old = spec.lookup(key)
    if not old:
        return None
    first = fits(old, WIDTH_STEP)
    new = next((v for v in range(first, first + 4 * math.lcm(period, WIDTH_STEP), WIDTH_STEP) if suits(v)), None)
    edits = pad_edits(spec, tensors, key, new) if new else ()
    if new is None or not edits:
        return None
    block = spec.section(checkpoint.value("config.json") or {})
    config = SetJson("config.json", spec.at(key), new, expect=block.get(key, MISSING))
    title = _(
        "zero-pad the MLP: {key} {old} -> {new} (+{share:.1%} of its weights, same outputs in exact arithmetic)",
        key=key,
        old=old,
        new=new,
        share=new / old - 1,
    )
    return title, (*edits, config)


def keep_edits(linears: Iterable, names: Iterable[str]) -> tuple[Keep, ...]:
    """Edits that leave these linears, and what is fused with them, in 16 bits: by the last part of their names where it
    means no others.
    """
    linears = list(linears)
    wanted = set(together(linears, names))
    tails: dict[str, set[str]] = {}
    for x in linears:
        tails.setdefault(x.name.rpartition(".")[2], set()).add(x.name)
    patterns = [
        [f"*.{tail}"] if all_of <= wanted and len(all_of) > 1 else sorted(all_of & wanted)
        for tail, all_of in tails.items()
    ]
    return tuple(Keep(pattern) for found in patterns for pattern in found)
