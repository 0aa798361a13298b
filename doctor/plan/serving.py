"""Which releases of a runtime read a stored format, and on which GPUs: the tables `stored` and `served`, asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.plan.runtimes import version_before

# What compressed-tensors takes where a group does not say it (quantization/quant_args.py, QuantizationArgs).
UNSTATED = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


def newest(runtime: str) -> str:
    """The newest release of a runtime that was read; "" where none was."""
    rows = table("stored").get(runtime)
    return rows[-1]["version"] if rows else ""


def reads_method(runtime: str, version: str, method: str) -> bool | None:
    """Whether a release reads this quant_method; None where that is not known. version: "" is the newest that was read.

    Of a release between two that were read is known what both have or neither has.
    """
    rows = table("stored").get(runtime, [])
    if not rows or (version and version_before(version, rows[0]["version"])):
        return None
    answers = {method in row["methods"] for row in _around(rows, version)}
    return answers.pop() if len(answers) == 1 else None


def readers_of(method: str) -> list[str]:
    """Runtimes whose newest release that was read has a reader for this quant_method."""
    return [name for name, rows in table("stored").items() if method in rows[-1]["methods"]]


def first_with(runtime: str, method: str) -> str:
    """The oldest release that was read and reads this quant_method; "" for none."""
    return next((row["version"] for row in table("stored").get(runtime, []) if method in row["methods"]), "")


def schemes(runtime: str, version: str) -> list[Mapping[str, Any]] | None:
    """Rows of the table `served` that a release has or may have; None where nothing of it is known."""
    known = table("served").get(runtime)
    if known is None or (version and version_before(version, known["first"])):
        return None
    return [r for r in known["row"] if not version or not version_before(version, r["since"]) or not _lacks(r, version)]


def stated(args: Any) -> dict[str, Any] | None:
    """What compressed-tensors makes of a group's object; None where there is none."""
    if not isinstance(args, Mapping):
        return None
    found = UNSTATED | {key: value for key, value in args.items() if value is not None}
    size = found.get("group_size")
    if "strategy" not in found:
        grouped = "channel" if size == -1 else "group" if isinstance(size, int) and size > 0 else ""
        found["strategy"] = grouped or ("token" if found["dynamic"] else "tensor")
    return found | {"dynamic": bool(found["dynamic"])}


def serves(
    row: Mapping[str, Any], weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, form: str | None
) -> bool:
    """Whether a row of the table `served` is one for this group."""
    if row["formats"] and form not in row["formats"]:
        return False
    fits = row["none"] if inputs is None else any(_agrees(kind, inputs) for kind in row["inputs"])
    return fits and _agrees(row["weights"], weights)


def groups_of(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """(name, group, its format) of config_groups that say something of weights."""
    groups = raw.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield name, group, group.get("format") or raw.get("format")


def capability_of(row: Mapping[str, Any], version: str) -> int:
    """The lowest compute capability that a row of `served` asks for, as 75 for 7.5; 0 for any."""
    asked = [least for since, least in row["capability"] if not version or not version_before(version, since)]
    return asked[-1] if asked else row["capability"][0][1] if row["capability"] else 0


def least_capability(recipe: Recipe, raw: Mapping[str, Any]) -> int:
    """The lowest compute capability of a GPU on which the recipe's runtime computes with what quantization_config says,
    as 75 for 7.5; 0 where that is not known or any will do.
    """
    runtime, version = recipe.runtime, recipe.runtime_version
    if "config_groups" in raw:
        rows = schemes(runtime, version) or []
        least = [
            min((capability_of(r, version) for r in rows if serves(r, weights, stated(inputs), form)), default=0)
            for _name, group, form in groups_of(raw)
            for weights, inputs in [(stated(group["weights"]) or {}, group.get("input_activations"))]
        ]
        return max(least, default=0)
    method = str(raw.get("quant_method"))
    rows = _around(table("stored").get(runtime, []), version)
    return max((row.get("capability", {}).get(method, 0) for row in rows), default=0)


def computes_on(recipe: Recipe, raw: Mapping[str, Any], capability: int) -> bool | None:
    """Whether the recipe's runtime computes with what quantization_config says on a GPU of this compute capability (75
    for 7.5); None where nothing is known of it.
    """
    runtime, version = recipe.runtime, recipe.runtime_version
    if "config_groups" in raw:
        rows = schemes(runtime, version) or []
        answers = []
        for _name, group, form in groups_of(raw):
            weights, inputs = stated(group["weights"]) or {}, stated(group.get("input_activations"))
            own = [r for r in rows if serves(r, weights, inputs, form)]
            if own:
                answers.append(any(_suits(row, version, capability) for row in own))
        return all(answers) if answers else None
    least = least_capability(recipe, raw)
    return capability >= least if least else None


def _suits(row: Mapping[str, Any], version: str, capability: int) -> bool:
    least = capability_of(row, version)
    return capability == least if row.get("exact") and least else capability >= least


def _around(rows: list[Mapping[str, Any]], version: str) -> list[Mapping[str, Any]]:
    """The row of a release, or those of the last release before it and the first one after it. "" is the newest."""
    if not version:
        return rows[-1:]
    before = [r for r in rows if not version_before(version, r["version"])][-1:]
    if before and not version_before(before[0]["version"], version):
        return before
    return before + [r for r in rows if version_before(version, r["version"])][:1]


def _lacks(row: Mapping[str, Any], version: str) -> bool:
    """Whether a release is one that was read without this row, or older."""
    return "absent" in row and not version_before(row["absent"], version)


def _agrees(allowed: Mapping[str, Any], args: Mapping[str, Any]) -> bool:
    return all(args.get(key) in values for key, values in allowed.items())
