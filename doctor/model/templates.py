"""Tensor templates of the families in rules/tables/architectures: names with {i} and {e}, and shapes as expressions."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from doctor.core.tables import family as family_table
from doctor.core.tables import table


@dataclass(frozen=True)
class Template:
    """One tensor of a family: the pattern of its name, and its shape as expressions over config keys."""

    tensor: str
    pattern: re.Pattern[str]
    shape: tuple[str, ...]
    role: str | None
    transposed: bool
    every_layer: bool  # false if only some decoder layers have it
    bias: object = False
    when: tuple[str | None, str | None] = (None, None)  # (only_with, only_without) of the table
    norm: str | None = None  # how a norm applies its weight, if the norms of the family differ
    layers: str | None = None  # the kind of decoder layer that has it; None: all kinds, or not known


@cache
def templates_of(family: str) -> tuple[Template, ...]:
    """Templates of every tensor in a family's table."""
    return tuple(
        Template(
            item["name"],
            name_pattern(item["name"]),
            tuple(item["shape"]),
            item.get("role"),
            item.get("transposed", False),
            "layers" not in item,
            item.get("bias", False),
            condition(item),
            item.get("norm"),
            item.get("layers"),
        )
        for item in family_table(family)["tensor"]
    )


def fused_layouts_of(model_type: str) -> list[dict[str, Any]]:
    """Entries of rules/tables/stacks.toml for a model type: how its files hold all experts in one 3-D tensor."""
    return [entry for entry in table("stacks")["stack"] if model_type in entry["models"]]


def expert_templates_of(model_type: str) -> Iterable[Template]:
    """Templates of the linears of single experts, for a model type whose files hold fused experts."""
    for entry in fused_layouts_of(model_type):
        for role in ("gate", "up", "down"):
            tensor = f"model.layers.{{i}}.{entry['linear'].replace('{role}', role)}.weight"
            shape = (entry["hidden"], entry["inner"]) if role == "down" else (entry["inner"], entry["hidden"])
            yield Template(tensor, name_pattern(tensor), shape, role, False, False, entry["biases"])


def fused_templates_of(model_type: str) -> Iterable[Template]:
    """Templates of the fused 3-D expert tensors of a model type."""
    for entry in fused_layouts_of(model_type):
        for role, size in (
            ("gate_up", (f"2 * {entry['inner']}", entry["hidden"])),
            ("down", (entry["hidden"], entry["inner"])),
        ):
            tensor = f"model.layers.{{i}}.{entry[role]}"
            shape = (entry["experts"], *(size[::-1] if entry["in_first"] else size))
            yield Template(tensor, name_pattern(tensor), shape, role, False, False, entry["biases"])


def condition(item: Mapping) -> tuple[str | None, str | None]:
    """Which models have the tensor of a table's entry: (only_with, only_without), keys of config.json."""
    return item.get("only_with"), item.get("only_without")


def exists(when: tuple[str | None, str | None], config: Mapping) -> bool:
    """Whether a model of this config has a tensor with this condition. A key set to null, 0 or false counts as
    absent.
    """
    needed, unwanted = (key is not None and not config.get(key, key) for key in when)
    return not needed and (when[1] is None or unwanted)


def name_pattern(template: str) -> re.Pattern[str]:
    """Names that match a template, with any prefix (`model.language_model.` and the like)."""
    body = template
    if "{i}" in template:
        before = template[: template.index("{i}")].rstrip(".").split(".")
        body = ".".join(before[-1:]) + "." + template[template.index("{i}") :]
    elif template.startswith("model."):
        body = template[len("model.") :]
    regex = re.escape(body).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
    return re.compile(rf"^(?P<prefix>(?:\w+\.)*?){regex}$")
