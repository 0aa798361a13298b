"""Which tensors of the files transformers' loader puts into which parameters of a class, by its own renames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def loaded_into(model: Any, names: Iterable[str]) -> list[tuple[str, str]]:
    """(tensor of the files, parameter or buffer of the class) of each name; a tensor that transformers joins with
    others keeps a name that is none of the class's.
    """
    from transformers.conversion_mapping import WeightConverter, WeightRenaming, get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    found = []
    for name in names:
        target, _pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            target, _pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        found.append((name, target))
    return found
