"""Broken files from whole ones: structure-aware, and the same for the same seed.

A mutation changes the tree of a JSON document (another value, a key twice, a branch moved, deep or long ones), or its
text, or the bytes of a file. Most results are valid at one level and wrong at the next, which is where readers fail.
"""

import copy
import json
import random
import struct
from collections.abc import Callable

NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -0.0, 64.0)
TEXTS = (
    "",
    "F32",
    "BF16",
    "F4",
    "F6_E2M3",
    "weight",
    "../x",
    "/etc/passwd",
    "a" * 3000,
    "\x00",
    "\x1b[31m",
    "\u202e",
    "é",
)
ODD = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], {"": {}}, [0] * 300, float("nan"), float("inf"), "\ud800")


class Mutator:
    """Mutations drawn from one seed."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def tree(self, document: object, times: int = 0) -> object:
        """A copy of a JSON value with a few changes."""
        document = copy.deepcopy(document)
        for _ in range(times or self.draw.randint(1, 4)):
            document = self._changed(document)
        return document

    def _changed(self, document: object) -> object:
        holders = list(_holders(document))
        if not holders or self.draw.random() < 0.02:
            return self.value()
        holder = self.draw.choice(holders)
        key = self.draw.choice(list(holder)) if isinstance(holder, dict) else self.draw.randrange(len(holder))
        kind = self.draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[self.draw.choice((*TEXTS, str(key) + "x", "__metadata__"))] = holder.pop(key)
        elif kind == 2:
            holder[key] = copy.deepcopy(self.draw.choice(holders))
        elif kind == 3 and isinstance(holder, list):
            holder.insert(key, self.value())
        elif kind == 4 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += self.draw.choice((-1, 1, 8, -8, 1000))
        elif kind == 5:
            holder[key] = [holder[key]]
        else:
            holder[key] = self.value()
        return document

    def value(self) -> object:
        return copy.deepcopy(self.draw.choice(ODD))

    def text(self, document: object) -> bytes:
        """A changed document as bytes; sometimes its text is changed too."""
        raw = json.dumps(self.tree(document), indent=self.draw.choice((None, None, 2))).encode()
        if self.draw.random() < 0.3:
            raw = self.draw.choice((self.cut, self.flip, self.twice, self.deep, self.mark))(raw)
        return raw

    def cut(self, raw: bytes) -> bytes:
        return raw[: self.draw.randrange(len(raw) + 1)]

    def flip(self, raw: bytes) -> bytes:
        found = bytearray(raw)
        for _ in range(self.draw.randint(1, 6)):
            if found:
                found[self.draw.randrange(len(found))] = self.draw.choice(b'{}[]",:0\\\xff\x00 e-')
        return bytes(found)

    def binary(self, raw: bytes, head: int) -> bytes:
        """Other numbers of one, four or eight bytes among the first `head`, other letters, or an early end."""
        found = bytearray(raw)
        for _ in range(self.draw.randint(1, 4)):
            size = self.draw.choice((1, 4, 8))
            at = self.draw.randrange(min(head, len(found)) - size)
            old = int.from_bytes(found[at : at + size], "little")
            new = self.draw.choice((*NUMBERS[:10], old + 1, old - 1, old ^ 1 << self.draw.randrange(8 * size), 13))
            found[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        if self.draw.random() < 0.1:
            del found[self.draw.randrange(len(found)) :]
        return bytes(found)

    def twice(self, raw: bytes) -> bytes:
        """The first member again, with another value."""
        return raw.replace(b"{", b'{"model_type": 1, "model_type": {"a": 1, "a": NaN}, ', 1)

    def deep(self, raw: bytes) -> bytes:
        levels = self.draw.choice((100, 250, 2000))
        return raw.replace(b"{", b'{"x": ' + b"[" * levels + b"]" * levels + b", ", 1)

    def mark(self, raw: bytes) -> bytes:
        return b"\xef\xbb\xbf" + raw

    def shard(self, header: dict, data: int) -> bytes:
        """A safetensors file of a changed header; sometimes its length or end are changed too."""
        raw = self.text(header)
        length = len(raw)
        if self.draw.random() < 0.15:
            length = self.draw.choice((0, 1, length - 1, length + 1, length + data, 2**63, 2**64 - 1, 100_000_001))
        body = bytes(max(0, data + self.draw.choice((0, 0, 0, 0, -1, 1, -data, 64))))
        return struct.pack("<Q", length % 2**64) + raw + body


def _holders(document: object):
    """Every object or array that holds something."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, (dict, list)) and value:
            yield value
            stack.extend(value.values() if isinstance(value, dict) else value)


def header_of(raw: bytes) -> tuple[dict, int]:
    """(header, bytes of data) of a whole safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), len(raw) - 8 - length


Case = Callable[[int], None]
