"""A checkpoint seen through one tensor of each kind, so that a plan for a large mixture is worked out in no time.

Decoder layers whose tensors have the same names and shapes count as one layer, and the experts of a layer as one
expert. `times` says how many tensors each one stands for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Kinds:
    """view: a Checkpoint whose `tensors` are one of each kind. times: name -> tensors that it stands for."""

    view: Checkpoint
    times: Mapping[str, int]


def one_of_each(checkpoint: Checkpoint) -> Kinds:
    """The kinds of tensors of a checkpoint, from headers."""
    layers: dict[str, dict[tuple[str, tuple[int, ...]], list[TensorInfo]]] = {}
    kept: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        layer = _LAYER.search(name)
        if layer is None:
            kept[name] = info
            continue
        tail = _EXPERT.sub(".experts.N.", name[layer.start(1) :].partition(".")[2] or name)
        layers.setdefault(name[: layer.end()], {}).setdefault((tail, info.shape), []).append(info)
    times = dict.fromkeys(kept, 1)
    alike: dict[tuple[str, frozenset], list[str]] = {}
    for prefix, tensors in layers.items():
        stem = _LAYER.sub("", prefix)
        signature = frozenset((kind, len(members)) for kind, members in tensors.items())
        alike.setdefault((stem, signature), []).append(prefix)
    for prefixes in alike.values():
        for members in layers[prefixes[0]].values():
            kept[members[0].name] = members[0]
            times[members[0].name] = len(prefixes) * len(members)
    view = copy.copy(checkpoint)
    view.tensors = kept  # in the place of the cached property
    return Kinds(view, times)
