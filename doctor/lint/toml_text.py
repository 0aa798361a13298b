"""A TOML file with the line of each key, and checks of its keys and types that name file and line."""

import re
import tomllib
from collections.abc import Mapping
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from doctor.core.errors import DoctorError
from doctor.core.messages import _

STRING, STRINGS = _("a string"), _("a list of strings")
BOOLEAN, WHOLE_NUMBER, NUMBER = _("true or false"), _("a whole number"), _("a number")
TABLE, TABLES, DATE = _("a table"), _("an array of tables"), _("a date")


class TomlText:
    """A parsed TOML file that knows the line of each key. tomllib gives no positions, so they are searched in the text.

    prefix: the table that holds our keys ("tool.doctor" of a pyproject.toml). local_name: the file's own name in
    messages instead of its path. Raises DoctorError for a file that is not TOML.
    """

    def __init__(self, path: Path, raw: bytes, prefix: str, local_name: bool = False) -> None:
        self.name = path.name if local_name else shown_path(path)
        self.file = path.name if local_name else str(path.resolve())
        self.prefix, name = prefix, self.name
        try:
            self.text = raw.decode("utf-8")
            self.document = tomllib.loads(self.text)
        except UnicodeDecodeError as error:
            raise DoctorError(
                _("{file}: not UTF-8 at byte {byte}.", file=name, byte=error.start), _("Save it as UTF-8.")
            ) from None
        except tomllib.TOMLDecodeError as error:
            where = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
            spot = f":{where[1]}:{where[2]}" if where else ""
            raise DoctorError(
                _("{file}: not TOML: {error}.", file=f"{name}{spot}", error=str(error).partition(" (at")[0]),
                _("Correct the file."),
            ) from None
        except RecursionError:
            raise DoctorError(_("{file}: nested too deeply.", file=name), _("Correct the file.")) from None

    @cached_property
    def table(self) -> dict[str, Any]:
        """Our keys, written with hyphens, and their values."""
        found = self.document
        for key in filter(None, self.prefix.split(".")):
            found = found.get(key, {})
        if not isinstance(found, dict):
            raise DoctorError(
                _(
                    "{file}: {key} is {found}; it must be {must}.",
                    file=self.name,
                    key=self.prefix,
                    found=kind_of(found),
                    must=TABLE,
                )
            )
        return {hyphenated(k): v for k, v in found.items()}

    def line(self, key: str, table: str = "", nth: int = 0) -> int:
        """Line of a key in a table, or in the nth of an array of tables; else the line of the table's header; else
        1.
        """
        wanted = ".".join(filter(None, (self.prefix, table)))
        places = self._places.get(wanted, [])
        places = places[nth : nth + 1] if table == "suppress" else places
        for header, end in places if key else ():
            for number in range(header + 1, end):
                if hyphenated(_first_word(self._lines[number - 1])) == hyphenated(key):
                    return number
        headers = [header for header, _end in places if header]
        below = self._places.get(".".join(filter(None, (wanted, key))), [])
        return headers[-1] if headers else below[0][0] if below and below[0][0] else 1

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def _places(self) -> dict[str, list[tuple[int, int]]]:
        """Name of a table -> (line of its header, line after its last one) of each; "" begins before the first line."""
        headers = [(0, "")]
        for number, line in enumerate(self._lines, 1):
            head = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line)
            if head:
                headers.append((number, re.sub(r"[\s\"']", "", head[1])))
        places: dict[str, list[tuple[int, int]]] = {}
        ends = [number for number, _name in headers[1:]] + [len(self._lines) + 1]
        for (number, name), end in zip(headers, ends, strict=True):
            places.setdefault(name, []).append((number, end))
        return places

    def wrong(self, line: int, what: str, must: str = "") -> DoctorError:
        """The error for a line: what is there, and what must be there if that can be said."""
        where = f"{self.name}:{line}"
        return DoctorError(
            _("{where}: {what}; it must be {must}.", where=where, what=what, must=must)
            if must
            else _("{where}: {what}.", where=where, what=what),
            _("`doctor check --show-settings` shows every key."),
        )

    def checked(
        self, table: Mapping[str, Any], types: Mapping[str, str], name: str = "", nth: int = 0
    ) -> dict[str, Any]:
        """The table as a dict, if its keys are known and its values of the right type. Raises DoctorError with the
        line.
        """
        label = f"{name}." if name else ""
        for key, value in table.items():
            if key not in types:
                import difflib

                near = difflib.get_close_matches(key, types, 1)
                unknown = f"{label}{key}"
                raise self.wrong(
                    self.line(key, name, nth),
                    _("unknown key {key}; did you mean {near}?", key=unknown, near=near[0])
                    if near
                    else _("unknown key {key}; known keys are {known}", key=unknown, known=", ".join(types)),
                )
            if not is_kind(value, types[key]):
                raise self.wrong(
                    self.line(key, name, nth),
                    _("{key} is {found}", key=f"{label}{key}", found=kind_of(value)),
                    types[key],
                )
        return dict(table)


def hyphenated(key: str) -> str:
    """`group_size` as `group-size`: keys may be written either way."""
    return key.replace("_", "-")


def is_kind(value: object, kind: str) -> bool:
    """Whether a TOML value is of a kind, one of the constants of this file."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    holds: dict[str, bool] = {
        STRING: isinstance(value, str),
        BOOLEAN: isinstance(value, bool),
        WHOLE_NUMBER: whole,
        NUMBER: whole or isinstance(value, float),
        TABLE: isinstance(value, dict),
        DATE: isinstance(value, date),
        STRINGS: isinstance(value, list) and all(isinstance(v, str) for v in value),
        TABLES: isinstance(value, list) and all(isinstance(v, dict) for v in value),
    }
    return holds[kind]


def kind_of(value: object) -> str:
    """What a TOML value is, for a message: its kind, and a scalar's text."""
    names = {
        bool: BOOLEAN,
        int: WHOLE_NUMBER,
        float: NUMBER,
        str: STRING,
        dict: TABLE,
        list: _("a list"),
        date: DATE,
        datetime: DATE,
    }
    name = names.get(type(value), type(value).__name__)
    return name if isinstance(value, (dict, list)) else _("{kind} ({text})", kind=name, text=str(value)[:40])


def _first_word(line: str) -> str:
    found = re.match(r"\s*[\"']?([\w.-]+)", line)
    return found[1] if found else ""


def shown_path(path: str | Path) -> str:
    """A path as people write it: relative to the working directory if it is below it, else absolute."""
    path = Path(path).resolve()
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
