"""Maps the names of transformers' parameters to the names of the checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _


class ParameterNames:
    """Names of transformers' parameters (inside the base model) to names of the checkpoint's tensors.

    Checkpoints differ in their prefix (`model.`, `transformer.`, `language_model.model.`, `thinker.model.`, nothing)
    and by the renames that transformers applies when it loads; the part from the list of layers on is the same. A
    checkpoint may hold several lists of layers: the decoder's, a tower's, those of multi-token prediction (`mtp.`). Of
    these the decoder's is the one whose tensors have the names and shapes of the model's parameters; only its tensors
    are tensors of layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, base_prefix: str, layers_path: str, model_type: str, layers: nn.ModuleList
    ):
        self._base, self._layers_path = base_prefix, layers_path
        self._given: dict[str, str] = {}
        # A text model inside a whole one may be named by the renames of that, so both are tried.
        whole = str((checkpoint.value("config.json") or {}).get("model_type", ""))
        known = [transforms_of([model_type])]
        if whole != model_type and transforms_of([whole]):
            known.append(transforms_of([whole, model_type]))
        self._read = max((_Read(checkpoint, layers_path, t, layers) for t in known), key=lambda read: read.fit[0])
        self.stem = self._read.stem

    def give(self, name: str, source: str) -> None:
        self._given[name] = source

    def find(self, name: str) -> str | None:
        """The tensor of a parameter, None where the checkpoint has none."""
        if name in self._given:
            return self._given[name]
        if name.startswith(f"{self._layers_path}."):
            return self._read.by_name.get(name)
        outer = name.partition(".")[2]
        parent = self._layers_path.rpartition(".")[0]
        root = self.stem.removesuffix(f"{parent}." if parent else "")
        candidates = [
            f"{root}{name}",
            name,
            f"{self._base}.{name}",
            outer,
            f"{self._base}.{outer}",
            f"language_model.{name}",
            f"language_model.{self._base}.{name}",
            f"{self._base}.language_model.{name}",
        ]
        return next((self._read.by_name[c] for c in candidates if c in self._read.by_name), None)

    def parts(self, name: str) -> list[str]:
        """The tensors that transformers joins along their first axis into this parameter; [] where it joins none."""
        parts = self._read.parts.get(name, {})
        return [parts[place] for place in sorted(parts)]

    def of_layer(self, i: int) -> list[str]:
        return self._read.in_layer.get(i, [])


def require_shape(source: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises NotQuantizable where a tensor has another shape than the parameter that it is for."""
    if shape != wanted:
        raise NotQuantizable(
            _(
                "{tensor}: shape {shape}; config.json makes it {wanted}.",
                tensor=source,
                shape=list(shape),
                wanted=list(wanted),
            ),
            _("Run `doctor check`: rules F05x compare the tensors with config.json."),
        )


class _Read:
    """A checkpoint's names after these transforms. by_name: name -> tensor. parts: a parameter that is joined ->
    place -> tensor. in_layer: tensors of each decoder layer. stem: what stands before `layers.0.` in the decoder's
    names; fit: how many of its tensors have shape and name of a parameter, name alone, and how many layers it has.
    """

    def __init__(self, checkpoint: Checkpoint, path: str, transforms: list[Any], layers: nn.ModuleList):
        self.by_name: dict[str, str] = {}
        self.parts: dict[str, dict[int, str]] = {}
        self.in_layer: dict[int, list[str]] = {}
        inside = re.compile(rf"^((?:.*?\.)?){re.escape(path.rpartition('.')[2])}\.(\d+)\.(.+)$")
        lists: dict[str, list[tuple[int, str, str]]] = {}  # stem -> (layer, tail, tensor)
        for source in checkpoint.tensors:
            name = _renamed(source, transforms)
            self.by_name.setdefault(name, source)
            match = inside.match(name)
            if match:
                lists.setdefault(match[1], []).append((int(match[2]), match[3], source))
        for source in checkpoint.tensors:  # as transformers does where a rename gives no parameter's name
            self.by_name.setdefault(source, source)
        self.stem, self.fit = _decoder(lists, layers, checkpoint)
        for layer, tail, source in lists.get(self.stem, ()):
            name = f"{path}.{layer}.{tail}"
            self.by_name[name] = source
            self.in_layer.setdefault(layer, []).append(source)
            joined = _joined(name, transforms)
            if joined is not None:
                self.parts.setdefault(joined[0], {})[joined[1]] = source


def _decoder(
    lists: Mapping[str, Iterable[tuple[int, str, str]]], layers: nn.ModuleList, checkpoint: Checkpoint
) -> tuple[str, tuple[int, int, int]]:
    """What stands before `layers.0.` in the decoder's names, and how well it fits: of the lists of layers, the one that
    fits the model best.
    """
    shapes = {(i, name): p.shape for i, layer in enumerate(layers) for name, p in layer.named_parameters()}

    def fit(stem: str) -> tuple[int, int, int]:
        found = [(i, tail, source) for i, tail, source in lists[stem] if (i, tail) in shapes]
        same = sum(tuple(checkpoint.tensors[source].shape) == tuple(shapes[i, tail]) for i, tail, source in found)
        return same, len(found), len({i for i, _tail, _source in lists[stem]})

    best = max(lists, key=fit, default="")
    return best, fit(best) if lists else (0, 0, 0)


def transforms_of(kinds: Iterable[str | None]) -> list[Any]:
    """What transformers applies to tensors when it loads these model_types or classes: renames and converters."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:  # transformers before 5 names its parameters as checkpoints do
        return []
    return [item for kind in dict.fromkeys(kinds) if kind for item in get_checkpoint_conversion_mapping(kind) or []]


def _renamed(name: str, transforms: Iterable[Any]) -> str:
    from transformers.conversion_mapping import WeightRenaming

    for item in transforms:
        if isinstance(item, WeightRenaming):
            name = item.rename_source_key(name)[0]
    return name


def _joined(name: str, transforms: Iterable[Any]) -> tuple[str, int] | None:
    """(parameter, place) of a tensor that transformers joins with others along the first axis; None for the rest."""
    from transformers.core_model_loading import Concatenate, WeightConverter

    for item in transforms:
        if isinstance(item, WeightConverter):
            joins = [op for op in item.operations if isinstance(op, Concatenate) and op.dim == 0]
            if len(joins) == len(item.operations) == 1:
                target, pattern = item.rename_source_key(name)
                if pattern is not None:
                    return target, item.source_patterns.index(pattern)
    return None
