"""Several schemes in one file of compressed-tensors: a config group for each, with a layout of its own.

Written, linears of another scheme are named one by one, which counts before the class Linear of the common group. Read,
each linear goes by its own group, as the library and vLLM choose it (wanted.py).

Source: vllm-project/compressed-tensors 0.20 quantization/quant_config.py, config/base.py (mixed-precision).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from doctor.core.recipe import Recipe
from doctor.formats.registry import format_of
from doctor.formats.wanted import group_of

MIXED = "mixed-precision"  # what the library calls a file whose groups have layouts of their own


def with_schemes(stated: dict[str, Any], other: Mapping[str, Recipe]) -> dict[str, Any]:
    """A quantization_config with a group for each further scheme. other: the recipe of each linear that has another."""
    modules: dict[Recipe, list[str]] = {}
    for name, recipe in other.items():
        modules.setdefault(recipe, []).append(name)
    if not modules:
        return stated
    groups = dict(stated["config_groups"])
    for recipe, names in modules.items():
        own = format_of(recipe).config(recipe)["config_groups"]["group_0"]
        groups[f"group_{len(groups)}"] = {**own, "targets": sorted(names)}
    layouts = {group["format"] for group in groups.values()}
    return {**stated, "format": layouts.pop() if len(layouts) == 1 else MIXED, "config_groups": groups}


def alone(raw: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    """By a linear's name the quantization_config that it would have if all were of its group; the whole one where it
    has a single layout, or the linear no group.
    """
    if raw.get("format") != MIXED:
        return lambda module: raw
    chosen, made = group_of(raw), dict[int, Mapping[str, Any]]()

    def of(module: str) -> Mapping[str, Any]:
        group = chosen(module)
        if group is None:
            return raw
        layout = group.get("format") or raw.get("format")
        own = {**raw, "format": layout, "config_groups": {"group_0": {**group, "targets": ["Linear"]}}}
        return made.setdefault(id(group), own)

    return of
