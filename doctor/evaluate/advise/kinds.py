"""A checkpoint seen through one tensor of each kind, so that a plan for a large mixture is worked out in no time.

Decoder layers whose tensors have the same names and shapes count as one layer, and the experts of a layer as one
expert. `times` says how many tensors each one stands for.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from doctor.checkpoint.directory import Checkpoint, JsonFile
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import Unavailable
from doctor.edits.decoding import OWN_FILES, decoding
from doctor.edits.stored import Decoding
from doctor.formats.registry import verbatim_tails
from doctor.model.quantization_config import quantization_of

_LAYER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Kinds:
    """view: a Checkpoint whose `tensors` are one of each kind. times: name -> tensors that it stands for. numel: of
    all, with codes counted as the numbers that they stand for where that is known. weight_of: name of a tensor that
    stores a weight in codes, or a part of one -> that weight. file_bytes: of a GGUF model's tensors, whose types differ
    from layer to layer, and decoding: how they are stored; None elsewhere.
    """

    view: Checkpoint
    times: Mapping[str, int]
    numel: int
    weight_of: Mapping[str, str] = field(default_factory=dict)
    file_bytes: int | None = None
    decoding: Decoding | None = None

    @property
    def stored_bytes(self) -> int:
        """Of all tensors as they are stored."""
        if self.file_bytes is not None:
            return self.file_bytes
        return sum(times * self.view.tensors[name].nbytes for name, times in self.times.items())


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
            first = min(members, key=lambda info: info.name)  # so that all parts of a weight are of the same expert
            kept[first.name] = first
            times[first.name] = len(prefixes) * len(members)
    return _kinds(_with_tensors(checkpoint, kept), times)


def of_gguf(checkpoint: Checkpoint) -> tuple[Kinds, Kinds, int]:
    """(kinds as they are stored, the plain numbers that they stand for in bfloat16, fewest bits of their types) of a
    GGUF model. Raises BadCheckpoint for one that is not read.
    """
    from doctor.edits.gguf_floats import GgufAsFloats  # it needs NumPy

    view = GgufAsFloats(checkpoint, "BF16", tokenizer=False)
    floats = one_of_each(view)
    stored = view.decoding
    bits = min((one.scheme.bits for one in stored.stored), default=16)
    return replace(floats, file_bytes=checkpoint.total_bytes, decoding=stored), floats, bits


def as_floats(kinds: Kinds) -> tuple[Kinds, Kinds, int] | None:
    """(the same kinds with `weight_of`, the plain numbers that they stand for, fewest bits of their codes) of a
    quantized checkpoint; None where its codes are not read.
    """
    stored = kinds.view.tensors
    try:
        texts = {name: kinds.view.load(name).tobytes() for name in stored if name.endswith(verbatim_tails())}
        found = decoding(kinds.view, stored, quantization_of(kinds.view), texts)
    except (Unavailable, BadCheckpoint):
        return None
    if not found.stored:
        return None
    weight_of: dict[str, str] = {}
    plain, times = dict(stored), dict(kinds.times)
    for one in found.stored:
        parts = (*one.format.part_names, *one.format.beside)
        names = [one.codes.name, *(one.format.part_of(one.weight, part) for part in parts)]
        weight_of |= {name: one.weight for name in names if name in stored}
        many = times[one.codes.name]
        for name in names:
            plain.pop(name, None)
            times.pop(name, None)
        plain[one.weight] = one.codes._replace(name=one.weight, dtype=DTYPES[found.kind], shape=one.shape)
        times[one.weight] = many
    bits = min(one.scheme.bits for one in found.stored)
    floats = _kinds(_unquantized(_with_tensors(kinds.view, plain)), times)
    return replace(kinds, numel=floats.numel, weight_of=weight_of), floats, bits


def _kinds(view: Checkpoint, times: Mapping[str, int]) -> Kinds:
    return Kinds(view, times, sum(many * view.tensors[name].numel for name, many in times.items()))


def _unquantized(view: Checkpoint) -> Checkpoint:
    """The same without what its files say of its quantization."""
    block = quantization_of(view)
    view.json = {name: file for name, file in view.json.items() if name not in OWN_FILES}
    view.entries = {name: entry for name, entry in view.entries.items() if name not in OWN_FILES}
    if block is not None and block[1] == "config.json":
        config = json.loads(view.json["config.json"].raw.decode("utf-8-sig"))
        *path, last = block[2].split("/")[1:]
        place = config
        for key in path:
            place = place[key]
        del place[last]
        view.json["config.json"] = JsonFile("config.json", json.dumps(config).encode())
    return view


def _with_tensors(checkpoint: Checkpoint, tensors: dict[str, TensorInfo]) -> Checkpoint:
    view = copy.copy(checkpoint)
    view.tensors = tensors  # in the place of the cached property
    return view
