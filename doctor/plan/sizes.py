"""Which config key sets a linear's size, by the family's table of tensors, and what a size is when the key changes."""

from __future__ import annotations

import ast
from functools import cache

from doctor.model.expressions import evaluate
from doctor.model.linears import ROLE_OF_TAIL, in_extra_layer
from doctor.model.spec import ModelSpec


def role_of(name: str, spec: ModelSpec) -> tuple[str, int | None, int | None]:
    """(role, block, expert) of a module by the family's table, or by its last word."""
    for template in (*spec.templates, *spec.expert_templates):
        match = template.pattern.match(f"{name}.weight")
        if match and template.role:
            block, expert = (int(found) if (found := match.groupdict().get(k)) else None for k in ("i", "e"))
            return template.role, None if in_extra_layer(name) else block, expert
    numbers = [] if in_extra_layer(name) else [int(p) for p in name.split(".") if p.isdigit()]
    return ROLE_OF_TAIL.get(name.rsplit(".", 1)[-1], "other"), numbers[0] if numbers else None, None


def axis_expression(spec: ModelSpec, name: str, axis: int) -> str | None:
    """The family table's expression for a linear's size along an axis (0 out_features, 1 in_features)."""
    for template in (*spec.templates, *spec.expert_templates):
        if template.pattern.match(f"{name}.weight") and len(template.shape) == 2:
            return template.shape[1 - axis if template.transposed else axis]
    return None


def size_key(spec: ModelSpec, name: str, axis: int) -> str | None:
    """The config key that sets a linear's size along an axis: the only one, or the MLP's width; None where unclear."""
    expression = axis_expression(spec, name, axis)
    if expression is None:
        return spec.key_for("intermediate_size") if axis == 1 and role_of(name, spec)[0] == "down" else None
    keys = names_in(expression)
    widths = [key for key in keys if "intermediate" in key or "ffn" in key or "inner" in key]
    found = widths if len(widths) == 1 else keys
    return spec.key_for(found[0]) if len(found) == 1 else None


def resized(spec: ModelSpec, expression: str, key: str, value: int) -> int | None:
    """What a size expression gives when config[key] is `value`."""
    return evaluate(expression, lambda word: value if spec.key_for(word) == key else spec.lookup(word))


@cache
def names_in(expression: str) -> list[str]:
    """Names of config keys in a size expression."""
    return sorted({node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)})


def fits(size: int, unit: int) -> int:
    """The next multiple of `unit` at or above `size`."""
    return -(-size // unit) * unit
