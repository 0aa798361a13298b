"""A file with several recipes, to try one after the other: [[recipe]] tables in TOML, or a list of objects in JSON.

The keys are those of doctor.toml's [recipe], and `scheme` and `name`. What an entry does not say is taken from a base
recipe: the command's flags.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.near import nearest
from doctor.core.recipe import Recipe, parse_runtime
from doctor.formats.schemes import fields_of
from doctor.lint.config import recipe_types
from doctor.lint.toml_text import STRING, TABLES, is_kind, kind_of

MOST_BYTES = 1 << 20


class NamedRecipe(NamedTuple):
    """A recipe of the list, under the name that its entry gives it, else its label."""

    name: str
    recipe: Recipe


def read_recipes(path: Path, base: Recipe) -> list[NamedRecipe]:
    """The recipes of a .toml or .json file. Raises DoctorError with the file and the number of the entry."""
    entries = _entries(path)
    if not is_kind(entries, TABLES) or not entries:
        raise DoctorError(
            _("{file}: holds no list of recipes; must hold one or more.", file=path.name),
            _("Write [[recipe]] before the keys of each; in JSON, a list of objects."),
        )
    found = [_recipe(f"{path.name}: recipe {n}", entry, base) for n, entry in enumerate(entries, 1)]
    names = [name for name, _recipe_of in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DoctorError(
            _("{file}: two recipes are called {name}.", file=path.name, name=twice), _("Give each a `name` of its own.")
        )
    return found


def _entries(path: Path) -> Any:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DoctorError(_("{file}: larger than {n:,} bytes; must be a list.", file=path.name, n=MOST_BYTES))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return tomllib.loads(text).get("recipe")
    except OSError as error:
        raise DoctorError(_("{file}: {error}.", file=path, error=error.strerror)) from None
    except UnicodeDecodeError as error:
        raise DoctorError(_("{file}: not UTF-8 at byte {byte}.", file=path.name, byte=error.start)) from None
    except (tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise DoctorError(
            _("{file}: not {kind}: {error}.", file=path.name, kind=kind, error=str(error)[:100])
        ) from None


def _recipe(where: str, entry: Mapping[str, Any], base: Recipe) -> NamedRecipe:
    types = {**recipe_types(), "scheme": STRING, "name": STRING}
    values: dict[str, Any] = {}
    for key, value in ((key.replace("-", "_"), value) for key, value in entry.items()):
        if key not in types:
            near = nearest(key, types)
            raise DoctorError(_("{where}: unknown key {key}.", where=where, key=key), near)
        if not is_kind(value, types[key]):
            raise DoctorError(
                _(
                    "{where}: {key} is {found}; must be {must}.",
                    where=where,
                    key=key,
                    found=kind_of(value),
                    must=types[key],
                )
            )
        values[key] = tuple(value) if isinstance(value, list) else value
    name, scheme = values.pop("name", ""), values.pop("scheme", "")
    try:
        if "runtime" in values:
            values["runtime"], values["runtime_version"] = parse_runtime(values["runtime"])
        if scheme:
            values |= fields_of(scheme, values)
        elif "method" in values:  # the base's format may be another method's
            values = {"format": "", "sym": None, **values}
        recipe = replace(base, **values)
    except DoctorError as error:
        raise DoctorError(_("{where}: {error}", where=where, error=error.message), error.hint) from None
    return NamedRecipe(name or scheme or recipe.label(), recipe)
