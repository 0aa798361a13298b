"""The tensors that readers of a quantization_config make room for: which parts a linear must have, of which type and
shape, and which they have no parameter for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from doctor.core.patterns import pattern_of
from doctor.formats.exclusions import Exclusion
from doctor.formats.widths import exactly

Sizes = tuple[int, int]  # (out_features, in_features)
FLOATS = ("F16", "BF16", "F32")
WHOLE = ("I64", "I32")
MUST, MAY, NEVER = "must", "may", "never"
ONE: tuple[tuple[int, ...], ...] = ((1,), ())


class Wanted(NamedTuple):
    """One part of a linear. dtypes, shapes: any of these; () is any. says: the key and value that ask for it. presence:
    MUST, MAY or NEVER; readers have no parameter for what must not be there.
    """

    part: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    says: str
    presence: str = MUST
    values: tuple[int, ...] = ()  # what it must hold, where that is known


def no_room(part: str, says: str) -> Wanted:
    """A part that readers have no parameter for."""
    return Wanted(part, (), (), says, NEVER)


def group_of(raw: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any] | None]:
    """The config group of a linear by its name, as compressed-tensors and vLLM choose it: one that names it, else one
    whose pattern fits, else the one for the class Linear. None where no target is its own.
    """
    stated = raw.get("config_groups")
    groups = [g for g in (stated.values() if isinstance(stated, Mapping) else ()) if isinstance(g, Mapping)]
    pairs = [(target, g) for g in groups for target in _texts(g.get("targets"))]
    names = {target: g for target, g in reversed(pairs) if not target.startswith("re:")}
    patterns = [(pattern_of(target.removeprefix("re:")), g) for target, g in pairs if target.startswith("re:")]

    def group(module: str) -> Mapping[str, Any] | None:
        if module in names:
            return names[module]
        fitting = (g for pattern, g in patterns if pattern is not None and pattern.match(module))
        return next(fitting, names.get("Linear"))

    return group


def targets_of(raw: Mapping[str, Any]) -> list[Exclusion]:
    """Every target of the config groups: a name, a pattern after "re:", or a class of modules."""
    stated = raw.get("config_groups")
    found = []
    for name, group in stated.items() if isinstance(stated, Mapping) else ():
        for at, entry in enumerate(_texts(group.get("targets")) if isinstance(group, Mapping) else ()):
            pattern = entry.removeprefix("re:") if entry.startswith("re:") else exactly(entry)
            found.append(Exclusion.of_pattern(entry, f"/config_groups/{name}/targets/{at}", pattern))
    return found


def of_group(group: Mapping[str, Any], layout: object, sizes: Sizes | None) -> list[Wanted]:
    """The parts of a linear of a config group. layout: its format. sizes: None where config.json does not say them.

    vllm-project/compressed-tensors 0.20 compressors and quantization/lifecycle/initialize.py; vllm-project/vllm
    layers/quantization/compressed_tensors/schemes.
    """
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or not isinstance(layout, str) or layout not in _LAYOUTS:
        return []
    found = list(_LAYOUTS[layout](weights, layout, sizes))
    return found + list(_of_inputs(group.get("input_activations"), layout)) if found else []


def _packed_integers(weights: Mapping[str, Any], layout: str, sizes: Sizes | None) -> Iterator[Wanted]:
    bits, says = weights.get("num_bits"), f"format {layout}"
    if type(bits) is not int or not 1 <= bits <= 8:
        return
    words: tuple[tuple[int, ...], ...] = ()
    if sizes is not None:
        n, k = sizes  # before 0.18 a word held whole codes only
        words = tuple({(n, -(-k * bits // 32)): 0, (n, -(-k // (32 // bits))): 0})
    yield Wanted("weight_packed", ("I32",), words, f"num_bits {bits}" if words else says)
    yield Wanted("weight_shape", WHOLE, ((2,),), says, values=sizes or ())
    if weights.get("symmetric") is False:
        yield Wanted("weight_zero_point", ("I32",), (), "symmetric false")
    elif weights.get("symmetric") is True:
        yield no_room("weight_zero_point", "symmetric true")


def _bytes(weights: Mapping[str, Any], layout: str, sizes: Sizes | None) -> Iterator[Wanted]:
    """8-bit codes under the weight's own name, a scale for the tensor, each row or each block."""
    kind = weights.get("type", "int")
    yield Wanted("weight", ("F8_E4M3",) if kind == "float" else ("I8",), (sizes,) if sizes else (), f"type {kind}")
    if kind == "int" and weights.get("symmetric") is False:
        yield Wanted("weight_zero_point", (), (), "symmetric false")
    strategy = weights.get("strategy") or "tensor"
    shapes = _scale_shapes(strategy, weights, sizes)
    says = f"strategy {strategy}"
    if strategy == "block":
        says = f"block_structure {weights.get('block_structure')}"
    if shapes is not None:
        yield Wanted("weight_scale", FLOATS, shapes, says)


def _scale_shapes(strategy: str, weights: Mapping[str, Any], sizes: Sizes | None) -> tuple[tuple[int, ...], ...] | None:
    """None for a strategy that is not judged."""
    if strategy == "tensor":
        return ONE
    if strategy == "channel":
        return ((sizes[0], 1),) if sizes else ()
    if strategy == "block":
        block = weights.get("block_structure")
        if not is_block(block) or block is None:
            return None
        return (tiles(sizes, block),) if sizes else ()
    return None


def is_block(block: Any) -> bool:
    """Whether a value states rows and columns of a block."""
    return isinstance(block, (list, tuple)) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)


def tiles(sizes: Sizes, block: Iterable[int]) -> tuple[int, ...]:
    """The shape of one scale a block."""
    return tuple(math.ceil(size / side) for size, side in zip(sizes, block, strict=True))


def _nvfp4(weights: Mapping[str, Any], layout: str, sizes: Sizes | None) -> Iterator[Wanted]:
    says = f"format {layout}"
    yield Wanted("weight_packed", ("U8",), ((sizes[0], sizes[1] // 2),) if sizes else (), says)
    yield Wanted("weight_scale", ("F8_E4M3",), ((sizes[0], -(-sizes[1] // 16)),) if sizes else (), says)
    yield Wanted("weight_global_scale", ("F32", "BF16", "F16"), ONE, says)


def _mxfp4(weights: Mapping[str, Any], layout: str, sizes: Sizes | None) -> Iterator[Wanted]:
    says = f"format {layout}"
    yield Wanted("weight_packed", ("U8",), ((sizes[0], sizes[1] // 2),) if sizes else (), says)
    yield Wanted("weight_scale", ("U8", "F8_E8M0"), ((sizes[0], -(-sizes[1] // 32)),) if sizes else (), says)


def _of_inputs(inputs: Any, layout: str) -> Iterator[Wanted]:
    """Scales of activations: measured beforehand, or none."""
    if not isinstance(inputs, Mapping):
        return
    part = "input_global_scale" if layout.startswith("nvfp4") else "input_scale"
    dynamic = inputs.get("dynamic", False)
    if dynamic is True:
        yield no_room(part, "input_activations dynamic true")
    elif dynamic == "local" or inputs.get("strategy") in ("tensor", "tensor_group"):
        says = f"input_activations dynamic {'local' if dynamic else 'false'}"
        yield Wanted(part, FLOATS, ONE, says)


_LAYOUTS: Mapping[str, Callable[[Mapping[str, Any], str, Sizes | None], Iterator[Wanted]]] = {
    "pack-quantized": _packed_integers,
    "int-quantized": _bytes,
    "float-quantized": _bytes,
    "naive-quantized": _bytes,
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
}


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, (list, tuple)) else []
