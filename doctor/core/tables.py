"""Facts as data: the tables of rules/tables/, read once, never written.

They ship inside the package doctor.rules.tables and are found by path, so reading one imports no rule.
"""

import json
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def table(name: str) -> dict:
    """The table `name` ("architectures", "special_tokens", …), from NAME.toml or NAME.json."""
    folder = Path(find_spec("doctor.rules.tables").submodule_search_locations[0])
    toml = folder / f"{name}.toml"
    if toml.is_file():
        return tomllib.loads(toml.read_text(encoding="utf-8"))
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
