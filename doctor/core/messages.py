"""Messages as data: an English template and its named values, rendered in a reader's language when it is shown.

`_("{key} {value} is not divisible by {group}", key=key, value=size, group=128)` is a `Message`: a str equal to its
English text that keeps template and values. What compares, logs or stores a message sees plain English; a screen asks
for another language (doctor/locale/catalogue.py). Templates are gettext's message ids: the first argument of `_` and
the first two of `plural` are extracted, and a language is one catalogue, doctor/locale/LANGUAGE/LC_MESSAGES/doctor.po.

Values are formatted by str.format, so a template may say {count:,} or {share:.1%}; one without values is taken as it
stands, its braces too. A value that is a Message itself is translated with its sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

_SPEC = re.compile(r"[+]?\d{0,2},?(\.\d{1,2})?[a-z%]?")  # what a field of a template may ask of str.format


class Message(str):
    """A sentence for a person. template: English with named fields; values: what they hold; many: for counts but 1."""

    template: str
    values: Mapping[str, Any]
    many: str

    def __new__(cls, template: str, values: Mapping[str, Any] | None = None, many: str = "") -> Message:
        values = values or {}
        self = super().__new__(cls, _filled(template if not many or values["n"] == 1 else many, values))
        self.template, self.values, self.many = template, values, many
        return self

    def __getnewargs__(self) -> tuple:  # copy and pickle build it again from its parts
        return self.template, dict(self.values), self.many

    def rendered(self, look_up: Callable[[str, str, int], str]) -> str:
        """The text in another language. look_up(template, many, n) translates a template; n is 1 without a plural."""
        values = {name: rendered(value, look_up) for name, value in self.values.items()}
        return _filled(look_up(self.template, self.many, self.values["n"] if self.many else 1), values)


class Listing(Message):
    """Words in a row: "a, b and c". Each may be a Message."""

    words: tuple[str, ...]

    def __new__(cls, words: Iterable[str]) -> Listing:
        words = tuple(words)
        self = str.__new__(cls, _row(words, *SEPARATORS))
        self.template, self.values, self.many, self.words = "", {}, "", words
        return self

    def __getnewargs__(self) -> tuple:
        return (self.words,)

    def rendered(self, look_up: Callable[[str, str, int], str]) -> str:
        return _row([rendered(word, look_up) for word in self.words], *(look_up(text, "", 1) for text in SEPARATORS))


def _(template: str, /, **values: Any) -> Message:
    """A message with its values. Raises KeyError where the template names a value that is not given."""
    return Message(template, values)


def plural(one: str, many: str, /, n: int, **values: Any) -> Message:
    """`one` where n is 1, else `many`; both may name {n}."""
    return Message(one, {"n": n, **values}, many)


def listed(words: Iterable[str]) -> Listing:
    """`a, b and c`, in any language."""
    return Listing(words)


def rendered(value: Any, look_up: Callable[[str, str, int], str]) -> Any:
    """A message in another language; anything else as it is."""
    return value.rendered(look_up) if isinstance(value, Message) else value


def as_data(text: str) -> dict | None:
    """A message as JSON, which `from_data` reads: {"template", "values"} with "many" where it has one, or {"words"}.

    None for a plain str. NaN and infinities, which JSON has not, are {"float": "nan"}.
    """
    if not isinstance(text, Message):
        return None
    if isinstance(text, Listing):
        return {"words": [as_data(word) or str(word) for word in text.words]}
    values = {
        name: as_data(value) if isinstance(value, Message) else _plain(value) for name, value in text.values.items()
    }
    return {"template": text.template, "values": values} | ({"many": text.many} if text.many else {})


def from_data(data: Any) -> Any:
    """What `as_data` made: a Message from its parts, anything else as it is.

    Raises KeyError, ValueError, TypeError or IndexError where the parts do not fit, or where a template asks str.format
    for more than the numbers of a sentence need: a report may come from elsewhere.
    """
    if not isinstance(data, Mapping):
        return data
    if "words" in data:
        return Listing([from_data(word) for word in data["words"]])
    if "float" in data:
        return float(data["float"])
    many = data.get("many", "")
    for template in (data["template"], many):
        _refuse_strange_fields(template)
    return Message(data["template"], {name: from_data(value) for name, value in data["values"].items()}, many)


def collected(value: Any) -> dict[str, dict]:
    """English text -> data of every message inside a value of dicts, sequences and dataclasses; keys of dicts too."""
    found: dict[str, dict] = {}

    def look(part: Any) -> None:
        if isinstance(part, Message):
            found.setdefault(str(part), as_data(part) or {})
        elif isinstance(part, Mapping):
            for key, inner in part.items():
                look(key)
                look(inner)
        elif isinstance(part, (list, tuple, set, frozenset)):
            for inner in part:
                look(inner)
        elif is_dataclass(part) and not isinstance(part, type):
            for field in fields(part):
                look(getattr(part, field.name))

    look(value)
    return found


def restored(value: Any, messages: Any) -> Any:
    """A JSON value whose texts are messages again where `messages`, as `collected` made it, knows them.

    Data that do not give their own text are left out: the text stays as it is, in English.
    """
    known: dict[str, Message] = {}
    for text, data in messages.items() if isinstance(messages, Mapping) else ():
        try:
            message = from_data(data)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError):
            continue
        if isinstance(message, Message) and message == text:
            known[text] = message

    def look(part: Any) -> Any:
        if isinstance(part, str):
            return known.get(part, part)
        if isinstance(part, list):
            return [look(inner) for inner in part]
        if isinstance(part, dict):
            return {known.get(key, key): look(inner) for key, inner in part.items()}
        return part

    return look(value) if known else value


def _refuse_strange_fields(template: str) -> None:
    from string import Formatter  # for reports that are read again; not for the first screen

    for _text, name, spec, _conversion in Formatter().parse(template):
        if name is not None and not (name.isidentifier() and _SPEC.fullmatch(spec or "")):
            raise ValueError(f"field {name!r} with format {spec!r}")


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(value)}
    return value if isinstance(value, (bool, int, float)) else str(value)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    return template.format(**values) if values else template


def _row(words: tuple | list, comma: str, last: str) -> str:
    return comma.join(words[:-1]) + last + words[-1] if len(words) > 1 else "".join(words)


SEPARATORS = _(", "), _(" and ")  # between the words of a listing, and before its last
