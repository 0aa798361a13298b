"""The JSON schema of doctor.toml, made from what its reader checks (doctor/lint/config.py), for editors and CI."""

from __future__ import annotations

import json
from typing import Any

from doctor.core.finding import SEVERITIES
from doctor.core.recipe import FORMATS, GOALS, METHODS, RUNTIMES, Recipe
from doctor.lint.config import SUPPRESS_TYPES, TOP_TYPES, recipe_types
from doctor.lint.toml_text import BOOLEAN, DATE, NUMBER, STRING, STRINGS, WHOLE_NUMBER, hyphenated

FILE = "doctor.toml.schema.json"  # beside the report's schema, written by tools/generate_docs.py
_KINDS: dict[str, dict[str, Any]] = {
    STRING: {"type": "string"},
    STRINGS: {"type": "array", "items": {"type": "string"}},
    BOOLEAN: {"type": "boolean"},
    WHOLE_NUMBER: {"type": "integer"},
    NUMBER: {"type": "number"},
    DATE: {"type": "string", "format": "date"},  # as editors and JSON show a date of TOML
}


def config_schema() -> dict[str, Any]:
    """A schema of draft 2020-12. Keys may be written with hyphens or underscores, as the reader takes them."""
    top = {key: _KINDS[kind] for key, kind in TOP_TYPES.items() if kind in _KINDS}
    top["fail-on"] = {"enum": [*SEVERITIES, "never"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "doctor.toml",
        "description": "Settings of doctor; in pyproject.toml the same under [tool.doctor].",
        **_table({**top, "recipe": _table(_recipe()), "suppress": {"type": "array", "items": _suppression()}}),
    }


def config_schema_text() -> str:
    """The text of the file."""
    return json.dumps(config_schema(), indent=1) + "\n"


def _table(properties: dict[str, Any]) -> dict[str, Any]:
    """An object of these keys and no other, each in both spellings."""
    both = {
        spelling: value for key, value in properties.items() for spelling in (hyphenated(key), key.replace("-", "_"))
    }
    return {"type": "object", "properties": both, "additionalProperties": False}


def _recipe() -> dict[str, Any]:
    found = {key: dict(_KINDS[kind]) for key, kind in recipe_types().items()}
    found["method"] = {"enum": [*METHODS]}
    found["format"] = {"enum": ["", *FORMATS]}
    found["goal"] = {"enum": [*GOALS]}
    names = "|".join(name.replace(".", r"\.").replace("+", r"\+") for name in RUNTIMES)
    found["runtime"] = {"type": "string", "pattern": rf"^(({names})(==.+)?)?$"}
    found["tp"] |= {"minimum": 1}
    for key in ("damp", "damp_max"):
        found[key] |= {"minimum": 0, "maximum": 1}
    default = Recipe()
    for key, value in found.items():
        stated = getattr(default, key)
        if isinstance(stated, (bool, int, float)) or (isinstance(stated, str) and stated):
            value["default"] = stated
    found["sym"].pop("default", None)  # the method decides
    return found


def _suppression() -> dict[str, Any]:
    properties = {key: dict(_KINDS[kind]) for key, kind in SUPPRESS_TYPES.items()}
    properties["sha256"]["pattern"] = "^[0-9a-fA-F]{64}$"
    for key in ("code", "reason"):
        properties[key]["pattern"] = r"\S"
    return {**_table(properties), "required": ["code", "reason"]}
