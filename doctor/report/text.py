"""Numbers and texts as every format writes them: counts, sizes, times, and text that cannot steer a terminal."""

import os
import re
from itertools import pairwise
from typing import Any

# C0, C1, bidirectional overrides and line separators: a tensor name may hold them, and a terminal or a log would obey.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def relative(file: str) -> str:
    """A path from the working directory, where it lies below it."""
    below = os.path.relpath(file)
    return file if below.startswith("..") else below


def thousands(value: Any) -> str:
    return f"{value:,.0f}" if number(value) and abs(value) >= 1000 else figure(value)


def number(value: object) -> bool:
    """Whether this is a finite number (JSON reports hold NaN as a string)."""
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def figure(value: object) -> str:
    return f"{value:.4g}" if number(value) else str(value)


def percent(value: object) -> str:
    return f"{value:.1%}" if number(value) else str(value)


def count(n: float) -> str:
    """1234567 -> 1.2 M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{int(n)}"


def size(n: int) -> str:
    """Bytes in powers of ten, as download pages write them."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            value = n / limit
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{n} bytes"


def seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def pad(text: str, cells: int) -> str:
    """Text with blanks behind it to a width in cells, of which a Chinese character takes two."""
    from rich.cells import cell_len

    return text + " " * (cells - cell_len(text))


def one_line(text: str) -> str:
    return " ".join(text.split())


def safe(text: str) -> str:
    """Text with control characters written out, so that a file's contents cannot steer a terminal or forge a log
    line.
    """
    return _CONTROL.sub(
        lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", str(text)
    ).replace("\n", " ")


def safe_json(text: str) -> str:
    r"""A JSON document with its control characters as \u escapes: the same document, and no terminal obeys it."""
    return _CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def safe_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(safe, str(text).split("\n")))


def window(line: str, column: int, length: int, width: int) -> tuple[str, int]:
    """A long line cut around the marked part: (text, 1-based column in it). Minified JSON is one line of any length."""
    if len(line) <= width:
        return line, column
    begin = max(0, min(column - 1 - width // 4, len(line) - width + 2))
    head, tail = "…" if begin else "", "…"
    part = line[begin : begin + width - 2]
    if begin + width - 2 >= len(line):
        tail = ""
    return head + part + tail, column - begin + len(head)


def level(values: list, top: float) -> str:
    """One character per value: · for 0, eighths of a bar below top, ? for what is no number."""
    bars = "▁▂▃▄▅▆▇█"
    out = []
    for value in values:
        if value is None or isinstance(value, str) or value != value:
            out.append("?" if value is not None else " ")
        elif not value or top <= 0:
            out.append("·")
        else:
            out.append(bars[min(int(abs(value) / top * 8), 7)] if abs(value) != float("inf") else "█")
    return "".join(out)


def squeeze(values: list, width: int) -> list:
    """At most `width` values: neighbours become their largest, so that nothing high is lost."""
    if len(values) <= width:
        return list(values)

    def largest(part: list):
        odd = [v for v in part if isinstance(v, str) or (v is not None and v != v)]
        return odd[0] if odd else max((v for v in part if v is not None), key=abs, default=None)

    edges = [i * len(values) // width for i in range(width + 1)]
    return [largest(values[a:b]) for a, b in pairwise(edges)]
