"""Facts as data: the tables of rules/tables/, read once, never written.

They ship inside the package doctor.rules.tables and are found by path, so reading one imports no rule. The table of
architectures is a folder with one file a family, of which only the file that is asked for is parsed.
"""

import json
import re
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The first lines of a family's file: what a search for a class needs, without parsing ninety files.
_HEAD = re.compile(r'^(model_type|architecture) = "([^"]*)"', re.MULTILINE)


@cache
def table(name: str) -> dict:
    """The table `name` ("special_tokens", "stacks", …), from NAME.toml or NAME.json."""
    toml = tables_folder() / f"{name}.toml"
    if toml.is_file():
        return tomllib.loads(toml.read_text(encoding="utf-8"))
    return json.loads((tables_folder() / f"{name}.json").read_text(encoding="utf-8"))


@cache
def tables_folder() -> Path:
    """The directory that holds the tables."""
    found = find_spec("doctor.rules.tables")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("the package doctor.rules.tables is not installed")
    return Path(found.submodule_search_locations[0])


@cache
def family_names() -> tuple[str, ...]:
    """Families of the table of architectures, sorted."""
    return tuple(sorted(p.stem for p in (tables_folder() / "architectures").glob("*.toml")))


@cache
def family(name: str | None) -> dict:
    """A family's table, with every optional key filled in; {} for a family without a file."""
    if name not in family_names():
        return {}
    return parse_family((tables_folder() / "architectures" / f"{name}.toml").read_text(encoding="utf-8"))


def parse_family(text: str) -> dict:
    """The table in a family's file. Every optional key is filled in, but for those of single tensors."""
    stated = tomllib.loads(text)
    entry: dict[str, Any] = {
        "embed_tokens": "model.embed_tokens",
        "lm_head": "lm_head",
        "tie_word_embeddings": False,
        "norm": "weight * xhat",
        "defaults": {},
        "kinds": {},
        "linear_paths": [],
    } | stated
    entry["config_keys"] = {key: key for key in stated.get("config_keys", ())} | stated.get("renamed_keys", {})
    entry["kinds"] = {kind: (how,) if isinstance(how, str) else tuple(how) for kind, how in entry["kinds"].items()}
    return entry


@cache
def families_of(architecture: str) -> tuple[tuple[str, str], ...]:
    """(family, model_type) of every family that runs as this class, the class's own first.

    InternLM3 and EXAONE 3 run as LlamaForCausalLM.
    """
    found = []
    for name in family_names():
        head = dict(_HEAD.findall((tables_folder() / "architectures" / f"{name}.toml").read_text(encoding="utf-8")))
        if head["architecture"] == architecture:
            found.append((name, head["model_type"]))
    return tuple(sorted(found, key=lambda f: f[0].replace("_", "") + "forcausallm" != architecture.lower()))
