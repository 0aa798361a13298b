"""The recipes that an advice compares, and what each is expected to cost in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.formats.registry import KNOWN
from doctor.formats.schemes import SCHEMES, fields_of
from doctor.plan.serving import groups_of, least_capability, schemes, serves, stated

PLAIN, STORED = "16-bit", _("as stored")
OWN_FILES = ("llama.cpp",)  # reads no model as it was published


@dataclass(frozen=True)
class Candidate:
    """name: as people write it. recipe: None for weights as they are. flags: of `doctor quantize`, "" where nothing is
    quantized. key: its row in rules/tables/quality.toml.
    """

    name: str
    recipe: Recipe | None
    flags: str = ""
    key: str = ""


def candidates(runtime: str) -> Iterator[Candidate]:
    """What can be served by a runtime: the weights as they are, then schemes, then methods of groups."""
    if runtime not in OWN_FILES:
        yield Candidate(PLAIN, None, key=PLAIN)
    for entry in table("quality")["scheme"]:
        if runtime not in entry["runtimes"]:
            continue
        for group in entry.get("groups", [0]):
            made = _candidate(entry, group, runtime)
            if made is not None:
                yield made


def _candidate(entry: dict[str, Any], group: int, runtime: str) -> Candidate | None:
    name, fields, flags = entry["name"], dict(entry.get("fields", {})), [entry["flags"]]
    if name in SCHEMES:
        fields |= fields_of(name, {"group_size": group} if group else {})
    elif group:
        fields["group_size"] = group
    if group:
        flags.append(f"--group-size {group}")
    try:
        recipe = Recipe(**fields, runtime=runtime, goal="quantize")
    except DoctorError:  # a width or group that this version's format does not have
        return None
    label = f"{name} g{group}" if group > 0 else f"{name} rows" if group else name
    return Candidate(label, recipe, " ".join(flags), f"{name}/{group}" if group else name)


def expected(key: str) -> dict[str, Any]:
    """{order, kl, perplexity, model, weights_alone, published}: what the table has for a candidate."""
    known = table("quality")
    found: dict[str, Any] = {"order": known["order"].index(key) if key in known["order"] else len(known["order"])}
    if key == PLAIN:
        return found | {"kl": 0.0, "perplexity": 1.0}
    found |= dict(zip(("kl", "perplexity", "model"), known["measured"].get(key, ()), strict=False))
    entry: dict[str, Any] = next((e for e in known["scheme"] if e["name"] == key.partition("/")[0]), {})
    return found | {k: entry[k] for k in ("published", "weights_alone") if k in entry}


def needs_capability(recipe: Recipe, runtime: str) -> tuple[int, bool]:
    """(lowest compute capability that the runtime asks for, whether only that one will do); 0 where it asks for
    none.
    """
    lowest, form = int(table("engines")[runtime]["capability"]), KNOWN[recipe.output_format]
    if not form.groups_of_modules:
        return lowest, False
    rows = [row for found in _rows(recipe, runtime) or () for row in found]
    return max(lowest, least_capability(recipe, form.config(recipe))), any(row.get("exact") for row in rows)


def served(recipe: Recipe, runtime: str) -> bool | None:
    """Whether the runtime computes with this scheme; None where no table says."""
    found = _rows(recipe, runtime) if KNOWN[recipe.output_format].groups_of_modules else None
    return None if found is None else all(found)


def _rows(recipe: Recipe, runtime: str) -> list[list[Mapping[str, Any]]] | None:
    """Rows of the table `served` for each group that the recipe writes; None where nothing of the runtime is known."""
    known = schemes(runtime, "")
    if known is None:
        return None
    return [
        [r for r in known if serves(r, stated(group["weights"]) or {}, stated(group.get("input_activations")), form)]
        for _name, group, form in groups_of(KNOWN[recipe.output_format].config(recipe))
    ]


def on(recipe: Recipe, tp: int) -> Recipe:
    """The recipe for so many GPUs."""
    return replace(recipe, tp=tp)
