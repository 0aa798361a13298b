"""JSON texts: where a value is, what the standard parser accepts in silence, and edits that leave the rest as it is.

The standard parser drops positions; a finding must point at `config.json:13:24`, and an edit must change one value and
keep the user's formatting. So objects on the way to a value are read here, member by member, and everything beside that
way is skipped by the standard parser. What it accepts in silence (duplicate keys, NaN and Infinity, a byte order mark)
is reported by `parse`. A text may be hostile: no position is kept for every value, and pointers are made only for what
is reported, because a pointer is as long as its value is deep.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping
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
_SURROGATE = re.compile("[\ud800-\udfff]")
_decode = json.JSONDecoder().raw_decode
MAX_DEPTH = 200
MAX_POINTER_DEPTH = 32  # a value that is deeper has no place: each level on the way to it is read once
MAX_REPORTED = 1000  # duplicates, and values that are not standard, that are reported by pointer


@dataclass(frozen=True)
class Span:
    """Character offsets of one value, and of its key if it has one (else key_begin == begin)."""

    key_begin: int
    begin: int
    end: int


class JsonError(ValueError):
    """Not JSON; `line` and `column` are 1-based."""

    def __init__(self, reason: str, text: str, offset: int):
        self.reason = reason
        self.line, self.column = line_column(text, min(offset, len(text)))
        super().__init__(f"{reason} at line {self.line} column {self.column}")


def line_column(text: str, offset: int) -> tuple[int, int]:
    """1-based line and column of a character offset."""
    return text.count("\n", 0, offset) + 1, offset - (text.rfind("\n", 0, offset) + 1) + 1


def pointer(*keys: object) -> str:
    """RFC 6901 pointer of a path of keys."""
    return "".join("/" + str(k).replace("~", "~0").replace("/", "~1") for k in keys)


def split_pointer(path: str) -> list[str]:
    return [p.replace("~1", "/").replace("~0", "~") for p in path.split("/")[1:]]


def dumps(value: object, indent: int | None = None) -> str:
    """JSON text that UTF-8 can hold: a lone surrogate, which a text may bring as an escape, stays an escape."""
    return escaped(json.dumps(value, ensure_ascii=False, indent=indent))


def escaped(text: str) -> str:
    """A JSON text with its lone surrogates as escapes."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# where values are


class JsonPlaces:
    """Where the values of one valid text are. An object or array is read when something in it is asked for."""

    def __init__(self, text: str):
        self.text = text
        self._known: dict[tuple[str, ...], tuple[dict[str, int], array]] = {}

    def find(self, path: str) -> Span | None:
        """The place of the value at a JSON pointer, the last one where a key stands twice; None where there is none, or
        it is deeper than MAX_POINTER_DEPTH. Raises JsonError where the text is not JSON on the way.
        """
        keys = split_pointer(path)
        begin = start(self.text)
        if not keys:
            return Span(begin, begin, skip_value(self.text, begin))
        if len(keys) > MAX_POINTER_DEPTH:
            return None
        span = None
        for depth, key in enumerate(keys):
            numbers, places = self._members(tuple(keys[:depth]), begin)
            if key not in numbers:
                return None
            at = 3 * numbers[key]
            span = Span(*places[at : at + 3])
            begin = span.begin
        return span

    def _members(self, path: tuple[str, ...], begin: int) -> tuple[dict[str, int], array]:
        """Key, or index, of each value in an object or array -> its number; and three offsets for each number."""
        if path not in self._known:
            numbers, places = {}, array("I")
            for number, (key, span) in enumerate(members(self.text, begin)):
                numbers[key] = number
                places.extend((span.key_begin, span.begin, span.end))
            self._known[path] = numbers, places
        return self._known[path]


def start(text: str) -> int:
    """The offset of the document's value, behind a byte order mark and blanks."""
    return _skip(text, 1 if text.startswith("\ufeff") else 0)


def members(text: str, begin: int) -> Iterator[tuple[str, Span]]:
    """(key, place) of every value directly in the object or array at `begin`, in order; the key of an array's value is
    its index. Nothing for another value. Raises JsonError.
    """
    opening = text[begin : begin + 1]
    if opening not in ("{", "["):
        return
    at, number, closing = _skip(text, begin + 1), 0, "}" if opening == "{" else "]"
    if text[at : at + 1] == closing:
        return
    while True:
        key_begin = at
        if opening == "{":
            key, at = _key(text, at)
        else:
            key = str(number)
        end = skip_value(text, at)
        yield key, Span(key_begin, at, end)
        number += 1
        at = _next(text, end, closing)
        if at < 0:
            return


def _key(text: str, at: int) -> tuple[str, int]:
    """The key at an offset, and where its value begins."""
    if text[at : at + 1] != '"':
        raise JsonError(_("expected a key in double quotes"), text, at)
    key, at = _string(text, at)
    at = _skip(text, at)
    if text[at : at + 1] != ":":
        raise JsonError(_("expected ':' after the key"), text, at)
    return key, _skip(text, at + 1)


def _next(text: str, end: int, closing: str) -> int:
    """Where the next member begins, -1 behind the last one."""
    at = _skip(text, end)
    if text[at : at + 1] == closing:
        return -1
    if text[at : at + 1] != ",":
        expected = _("expected ',' or '}}'") if closing == "}" else _("expected ',' or ']'")
        raise JsonError(expected, text, at)
    return _skip(text, at + 1)


def skip_value(text: str, at: int) -> int:
    """Where the value at an offset ends, by the standard parser. Raises JsonError."""
    try:
        return _decode(text, at)[1]
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, text, error.pos) from None
    except (RecursionError, ValueError) as error:
        raise JsonError(_("not readable: {error}", error=str(error)[:100]), text, at) from None


# what the standard parser accepts in silence


@dataclass
class JsonText:
    """One parsed document, and what is odd about its text. Of duplicates and non_standard at most MAX_REPORTED."""

    text: str
    value: object = None
    duplicates: list[str] = field(default_factory=list)  # pointers that stand more than once; the last one wins
    non_standard: list[str] = field(default_factory=list)  # pointers whose value is NaN or Infinity
    overwritten: list[Span] = field(default_factory=list)  # members that a later one of the same key stands for
    unlike: bool = False  # some key that stands twice has two values
    bom: bool = False
    path: list[object] = field(default_factory=list)  # keys on the way to the value that is read now

    def report(self, found: list[str], *keys: object) -> None:
        """Add the pointer of the value that is read now to a list."""
        if len(found) < MAX_REPORTED:
            found.append(pointer(*self.path, *keys))


def parse(text: str) -> JsonText:
    """Read one document. Raises JsonError; accepts what Python's json accepts, and notes what the standard does not."""
    doc = JsonText(text, bom=text.startswith("\ufeff"))
    doc.value, end = _value(doc, start(text))
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


def _value(doc: JsonText, at: int) -> tuple[Any, int]:
    text = doc.text
    if len(doc.path) > MAX_DEPTH:
        raise JsonError(_("nested deeper than {limit} levels", limit=MAX_DEPTH), text, at)
    if at >= len(text):
        raise JsonError(_("the document ends where a value is expected"), text, at)
    if text[at] == "{":
        return _object(doc, at)
    if text[at] == "[":
        return _array(doc, at)
    return _string(text, at) if text[at] == '"' else _scalar(doc, at)


def _scalar(doc: JsonText, at: int) -> tuple[Any, int]:
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
                doc.report(doc.non_standard)
            return value, at + len(word)
    raise JsonError(_("unexpected {found!r}", found=doc.text[at]), doc.text, at)


def _string(text: str, at: int) -> tuple[str, int]:
    try:
        return scanstring(text, at + 1, True)
    except json.JSONDecodeError as error:
        raise JsonError(error.msg, text, error.pos) from None


def _object(doc: JsonText, at: int) -> tuple[dict[str, Any], int]:
    text = doc.text
    value: dict[str, Any] = {}
    spans: dict[str, tuple[int, int, int]] = {}
    at = _skip(text, at + 1)
    if text[at : at + 1] == "}":
        return value, at + 1
    while True:
        key_begin = at
        key, begin = _key(text, at)
        doc.path.append(key)
        found, end = _value(doc, begin)
        doc.path.pop()
        if key in value:
            doc.report(doc.duplicates, key)
            doc.overwritten.append(Span(*spans[key]))
            doc.unlike = doc.unlike or repr(value[key]) != repr(found)  # repr: NaN is like NaN, and 1 is not True
        value[key], spans[key] = found, (key_begin, begin, end)
        at = _next(text, end, "}")
        if at < 0:
            return value, _skip(text, end) + 1


def _array(doc: JsonText, at: int) -> tuple[list[Any], int]:
    text = doc.text
    value: list[Any] = []
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return value, at + 1
    while True:
        doc.path.append(len(value))
        item, end = _value(doc, at)
        doc.path.pop()
        value.append(item)
        at = _next(text, end, "]")
        if at < 0:
            return value, _skip(text, end) + 1


# edits


def set_value(text: str, path: str, value: object) -> str:
    """The text with the value at `path` set, everything else left as it is; a missing last key is appended.

    Raises KeyError when the parent is missing or is not an object. Indentation follows the neighbours.
    """
    places = JsonPlaces(text)
    span = places.find(path)
    if span is not None:
        literal = _literal(value, _indent(text, span.key_begin))
        return text[: span.begin] + literal + text[span.end :]
    parent_path, _slash, last = path.rpartition("/")
    parent = places.find(parent_path)
    if parent is None or text[parent.begin] != "{":
        raise KeyError(parent_path)
    key = dumps(split_pointer("/" + last)[0])
    last_child = None
    for _name, last_child in members(text, parent.begin):  # noqa: B007 - the last one is wanted
        pass
    if last_child is None:
        step = _indent(text, parent.key_begin) + "  "
        return f"{text[: parent.begin]}{{\n{step}{key}: {_literal(value, step)}\n{step[:-2]}}}{text[parent.end :]}"
    step = _indent(text, last_child.key_begin)
    one_line = "\n" not in text[parent.begin : last_child.key_begin]
    glue = ", " if one_line else ",\n" + step
    return f"{text[: last_child.end]}{glue}{key}: {_literal(value, step)}{text[last_child.end :]}"


def replace_strings(text: str, path: str, new: Mapping[str, str]) -> str:
    """The text with each string right below `path` that `new` names replaced; one reading, however many there are."""
    parent = JsonPlaces(text).find(path)
    parts, at = [], 0
    for _key, span in members(text, parent.begin) if parent is not None else ():
        if text[span.begin] == '"' and (old := json.loads(text[span.begin : span.end])) in new:
            parts += [text[at : span.begin], dumps(new[old])]
            at = span.end
    return "".join([*parts, text[at:]])


def remove_value(text: str, path: str) -> str:
    """The text without the key at `path` (an object's member). Raises KeyError when it is not there."""
    span = JsonPlaces(text).find(path)
    if span is None:
        raise KeyError(path)
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
        return dumps(value)
    return dumps(value, indent=2).replace("\n", "\n" + indent)
