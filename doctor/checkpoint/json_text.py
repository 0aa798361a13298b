"""A JSON parser that keeps the position of every value in the text.

The standard parser drops positions; a finding must point at `config.json:13:24`, and an edit must change one value and
keep the user's formatting. YAML parsers keep positions, but reject tabs and read some JSON differently, so this is a
small strict reader of JSON itself. It also reports what `json` accepts in silence: duplicate keys, NaN and Infinity, a
byte order mark.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.decoder import scanstring  # type: ignore[attr-defined]  # public, but not in the stubs
from typing import Any

from doctor.core.messages import _

_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_WORDS = {
    "true": True,
    "false": False,
    "null": None,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
MAX_DEPTH = 200


@dataclass(frozen=True)
class Span:
    """Character offsets of one value, and of its key if it has one (else key_begin == begin)."""

    key_begin: int
    begin: int
    end: int


@dataclass
class JsonText:
    """One parsed document. `spans` maps JSON pointers ("/rope_scaling/type") to places in `text`."""

    text: str
    value: object = None
    spans: dict[str, Span] = field(default_factory=dict)
    duplicates: list[str] = field(default_factory=list)  # pointers that stand more than once; the last one wins
    non_standard: list[str] = field(default_factory=list)  # pointers whose value is NaN or Infinity
    overwritten: list[Span] = field(default_factory=list)  # members that a later one of the same key stands for
    unlike: bool = False  # some key that stands twice has two values
    bom: bool = False

    def line_column(self, offset: int) -> tuple[int, int]:
        """1-based line and column of a character offset."""
        line = self.text.count("\n", 0, offset) + 1
        return line, offset - (self.text.rfind("\n", 0, offset) + 1) + 1


class JsonError(ValueError):
    """Not JSON; `line` and `column` are 1-based."""

    def __init__(self, reason: str, text: str, offset: int):
        self.reason = reason
        self.line, self.column = JsonText(text).line_column(min(offset, len(text)))
        super().__init__(f"{reason} at line {self.line} column {self.column}")


def pointer(*keys: object) -> str:
    """RFC 6901 pointer of a path of keys."""
    return "".join("/" + str(k).replace("~", "~0").replace("/", "~1") for k in keys)


def split_pointer(path: str) -> list[str]:
    return [p.replace("~1", "/").replace("~0", "~") for p in path.split("/")[1:]]


def parse(text: str) -> JsonText:
    """Read one document. Raises JsonError; accepts what Python's json accepts, and notes what the standard does not."""
    doc = JsonText(text)
    start = 0
    if text.startswith("\ufeff"):
        doc.bom, start = True, 1
    doc.value, end = _value(doc, _skip(text, start), "", 0)
    end = _skip(text, end)
    if end != len(text):
        raise JsonError("text after the end of the document", text, end)
    return doc


def parse_bytes(data: bytes) -> JsonText:
    """Like parse, for the bytes of a file; bytes that are not UTF-8 are a JsonError."""
    try:
        return parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        readable = data.decode("utf-8", "replace")
        raise JsonError(
            _("not UTF-8: byte 0x{byte:02x} at offset {offset}", byte=data[error.start], offset=error.start),
            readable,
            len(data[: error.start].decode("utf-8", "replace")),
        ) from None


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(doc: JsonText, at: int, path: str, depth: int) -> tuple[Any, int]:
    text = doc.text
    if depth > MAX_DEPTH:
        raise JsonError(_("nested deeper than {limit} levels", limit=MAX_DEPTH), text, at)
    if at >= len(text):
        raise JsonError(_("the document ends where a value is expected"), text, at)
    char = text[at]
    value: Any
    if char == "{":
        value, end = _object(doc, at, path, depth)
    elif char == "[":
        value, end = _array(doc, at, path, depth)
    elif char == '"':
        value, end = _string(text, at)
    else:
        value, end = _scalar(doc, at, path)
    old = doc.spans.get(path)
    doc.spans[path] = Span(old.key_begin if old else at, at, end)
    return value, end


def _scalar(doc: JsonText, at: int, path: str) -> tuple[Any, int]:
    number = _NUMBER.match(doc.text, at)
    if number:
        literal = number.group()
        if number.group(1) or number.group(2):
            return float(literal), number.end()
        if len(literal) > 4000:
            raise JsonError(_("a number of {count} digits", count=len(literal)), doc.text, at)
        return int(literal), number.end()
    for word, value in _WORDS.items():
        if doc.text.startswith(word, at):
            if value is not None and not isinstance(value, bool):
                doc.non_standard.append(path)
            return value, at + len(word)
    raise JsonError(_("unexpected {found!r}", found=doc.text[at]), doc.text, at)


def _string(text: str, at: int) -> tuple[str, int]:
    try:
        return scanstring(text, at + 1, True)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, text, error.pos) from None


def _object(doc: JsonText, at: int, path: str, depth: int) -> tuple[dict[str, Any], int]:
    text = doc.text
    value: dict[str, Any] = {}
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        return value, at + 1
    while True:
        if text[at : at + 1] != '"':
            raise JsonError(_("expected a key in double quotes"), text, at)
        key_begin = at
        key, at = _string(text, at)
        at = _skip(text, at)
        if text[at : at + 1] != ":":
            raise JsonError(_("expected ':' after the key"), text, at)
        child = path + pointer(key)
        if key in value:
            doc.duplicates.append(child)
            doc.overwritten.append(doc.spans[child])
        doc.spans[child] = Span(key_begin, at, at)
        seen, old = key in value, value.get(key)
        value[key], at = _value(doc, _skip(text, at + 1), child, depth + 1)
        doc.unlike = doc.unlike or (seen and repr(old) != repr(value[key]))  # repr: NaN is like NaN, and 1 is not True
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            return value, at + 1
        if text[at : at + 1] != ",":
            raise JsonError(_("expected ',' or '}}'"), text, at)
        at = _skip(text, at + 1)


def _array(doc: JsonText, at: int, path: str, depth: int) -> tuple[list[Any], int]:
    text = doc.text
    value: list[Any] = []
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return value, at + 1
    while True:
        item, at = _value(doc, at, path + pointer(len(value)), depth + 1)
        value.append(item)
        at = _skip(text, at)
        if text[at : at + 1] == "]":
            return value, at + 1
        if text[at : at + 1] != ",":
            raise JsonError(_("expected ',' or ']'"), text, at)
        at = _skip(text, at + 1)


def set_value(text: str, path: str, value: object) -> str:
    """The text with the value at `path` set, everything else left as it is; a missing last key is appended.

    Raises KeyError when the parent is missing or is not an object. Indentation follows the neighbours.
    """
    doc = parse(text)
    span = doc.spans.get(path)
    if span is not None:
        literal = _literal(value, _indent(text, span.key_begin))
        return text[: span.begin] + literal + text[span.end :]
    parent_path, _, last = path.rpartition("/")
    parent = doc.spans.get(parent_path)
    if parent is None or text[parent.begin] != "{":
        raise KeyError(parent_path)
    children = [
        s for p, s in doc.spans.items() if p.startswith(parent_path + "/") and "/" not in p[len(parent_path) + 1 :]
    ]
    key = json.dumps(split_pointer("/" + last)[0], ensure_ascii=False)
    if not children:
        step = _indent(text, parent.key_begin) + "  "
        return f"{text[: parent.begin]}{{\n{step}{key}: {_literal(value, step)}\n{step[:-2]}}}{text[parent.end :]}"
    last_child = max(children, key=lambda s: s.end)
    step = _indent(text, last_child.key_begin)
    one_line = "\n" not in text[parent.begin : last_child.key_begin]
    glue = ", " if one_line else ",\n" + step
    return f"{text[: last_child.end]}{glue}{key}: {_literal(value, step)}{text[last_child.end :]}"


def replace_strings(text: str, path: str, new: Mapping[str, str]) -> str:
    """The text with each string right below `path` that `new` names replaced; one reading, however many there are."""
    doc, parts, at = parse(text), [], 0
    for place, span in sorted(doc.spans.items(), key=lambda item: item[1].begin):
        if (
            place.rpartition("/")[0] == path
            and text[span.begin] == '"'
            and (old := json.loads(text[span.begin : span.end])) in new
        ):
            parts += [text[at : span.begin], json.dumps(new[old], ensure_ascii=False)]
            at = span.end
    return "".join([*parts, text[at:]])


def remove_value(text: str, path: str) -> str:
    """The text without the key at `path` (an object's member). Raises KeyError when it is not there."""
    doc = parse(text)
    span = doc.spans[path]
    after = _skip(text, span.end)
    if text[after : after + 1] == ",":
        return text[: span.key_begin] + text[_skip(text, after + 1) :]
    before = len(text[: span.key_begin].rstrip())
    if text[before - 1] == ",":
        return text[: before - 1] + text[span.end :]
    return text[:before] + text[after:]


def cleaned(text: str) -> str:
    """The text as readers take it: no byte order mark, each key of an object once with its last value; all else left as
    it is.
    """
    parts, at = [], 1 if text.startswith("\ufeff") else 0
    for span in sorted(parse(text).overwritten, key=lambda s: (s.key_begin, -s.end)):
        if span.key_begin >= at:  # else it lies inside one that is gone already
            parts.append(text[at : span.key_begin])
            at = _skip(text, _skip(text, span.end) + 1)  # a later member follows, so a comma does
    return "".join([*parts, text[at:]])


def _indent(text: str, offset: int) -> str:
    line = text[text.rfind("\n", 0, offset) + 1 : offset]
    return line[: len(line) - len(line.lstrip())]


def _literal(value: object, indent: str) -> str:
    if (
        not isinstance(value, (dict, list))
        or not value
        or (all(not isinstance(v, (dict, list)) for v in value) and isinstance(value, list))
    ):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, ensure_ascii=False, indent=2).replace("\n", "\n" + indent)
