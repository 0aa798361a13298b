"""Maps the names of transformers' parameters to the names of the checkpoint's tensors."""

from __future__ import annotations

import re

from doctor.checkpoint.directory import Checkpoint
from doctor.model.linears import NOT_TEXT


class ParameterNames:
    """Names of transformers' parameters (inside the base model) to names of the checkpoint's tensors.

    Checkpoints differ in their prefix (`model.`, `transformer.`, `language_model.model.`, nothing) and by the
    renames that transformers applies when it loads; the part from the list of layers on is the same.
    """

    def __init__(self, checkpoint: Checkpoint, base_prefix: str, layers_path: str, model_type: str):
        self._base = base_prefix
        self._given: dict[str, str] = {}
        self._by_name: dict[str, str] = {}
        self._layers: dict[int, list[str]] = {}
        last = layers_path.rpartition(".")[2]
        inside = re.compile(rf"(?:^|\.){re.escape(last)}\.(\d+)\.(.+)$")
        renames = _renames(model_type)
        for source in checkpoint.tensors:
            if NOT_TEXT.search(source):
                continue
            name = source
            for old, new in renames:
                name = name.replace(old, new)
            self._by_name.setdefault(name, source)
            match = inside.search(name)
            if match:
                self._by_name.setdefault(f"{layers_path}.{match[1]}.{match[2]}", source)
                self._layers.setdefault(int(match[1]), []).append(source)

    def give(self, name: str, source: str) -> None:
        self._given[name] = source

    def find(self, name: str) -> str | None:
        """The tensor of a parameter, None where the checkpoint has none."""
        if name in self._given:
            return self._given[name]
        outer = name.partition(".")[2]
        candidates = [
            name,
            f"{self._base}.{name}",
            outer,
            f"{self._base}.{outer}",
            f"language_model.{name}",
            f"language_model.{self._base}.{name}",
            f"{self._base}.language_model.{name}",
        ]
        return next((self._by_name[c] for c in candidates if c in self._by_name), None)

    def of_layer(self, i: int) -> list[str]:
        return self._layers.get(i, [])


def _renames(model_type: str) -> list[tuple[str, str]]:
    """Plain renames that transformers applies to this family's tensor names when it loads them."""
    try:
        from transformers.conversion_mapping import WeightRenaming, get_checkpoint_conversion_mapping
    except ImportError:  # transformers before 5 names its parameters as checkpoints do
        return []
    pairs = []
    for item in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(item, WeightRenaming):
            plain = [s.replace("\\.", ".") for s in item.source_patterns]
            pairs += [(s, t) for s, t in zip(plain, item.target_patterns, strict=False) if re.fullmatch(r"[\w.]+", s)]
    return pairs
