"""The page of a rule, which is the docstring of its file: headline, sections, and the messages of other tools it
quotes.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

SECTION = re.compile(r"^(Why|Seen as|Do|False alarms|Fix safety|Sources):[ ]*", re.M)
QUOTATION = re.compile(r"^- ([^:`]+): (``?)(.+)\2\s*$", re.M)
_FIRST = re.compile(r"^([A-Z]\d{3}) ([a-z][a-z0-9-]+): (.+?)\.?$", re.S)


@dataclass(frozen=True)
class Seen:
    """A message of another tool about the same defect, word for word."""

    tool: str
    text: str


def headline(doc: str, code: str) -> tuple[str, str]:
    """(name, title) of a page. Raises TypeError if it does not begin with `CODE name: title.`"""
    match = _FIRST.match(SECTION.split(doc.strip().partition("\n\n")[0], 1)[0].strip())
    if not match or match[1] != code:
        raise TypeError(f"rule {code}: the docstring must begin with '{code} name: what is wrong.'")
    return match[2], " ".join(match[3].split())


def write_page(code: str, name: str, title: str, sections: Mapping[str, str]) -> str:
    """A page with these sections: the `doc` of a Rule that is read from a report instead of its file."""
    return "\n\n".join([f"{code} {name}: {title}.", *(f"{heading}: {text}" for heading, text in sections.items())])


def sections_of(doc: str) -> dict[str, str]:
    """Heading of each section of a page -> its text."""
    parts = SECTION.split(inspect.cleandoc(doc))
    return {parts[i]: parts[i + 1].strip() for i in range(1, len(parts) - 1, 2)}


def quotations(text: str) -> tuple[Seen, ...]:
    """The messages that a "Seen as" section quotes. Each is between single or double backticks, and may contain
    others.
    """
    return tuple(Seen(tool.strip(), quote) for tool, _fence, quote in QUOTATION.findall(text))
