"""What a pasted text means once the names and numbers in it are read; symptoms in a user's own words.

Words alone mislead: a size mismatch of 128320 against 128256 rows is a vocabulary, not a width; an *unexpected*
lm_head.weight is the opposite of a missing one. rules/tables/readings.toml has a pattern for each such message.
"""

import re
from dataclasses import dataclass
from functools import cache

from doctor.core.tables import table

TYPED_LINES = 3  # more is a log, in which the words of a symptom are chance
TYPED_CHARACTERS = 240
LAST_LINES = 400  # of a log: the error stands at its end
_STACK = re.compile(r'^\s*(?:File "|at |\^+$)')


@dataclass(frozen=True)
class Reading:
    """rules: codes, most frequent cause first. unlike: codes that fit the words only. says, do: for people.

    symptom: a user's words, which say less than another tool's message that was found whole.
    """

    name: str
    rules: tuple[str, ...]
    unlike: tuple[str, ...]
    says: str
    do: str
    line: str
    at: int
    symptom: bool


@cache
def _entries() -> tuple[tuple[dict, tuple[re.Pattern, ...]], ...]:
    return tuple(
        (entry, tuple(re.compile(p, re.IGNORECASE) for p in entry["patterns"]))
        for entry in table("readings")["reading"]
    )


def read(text: str, lang: str = "en") -> Reading | None:
    """What the last line of `text` that fits a pattern means; None where none does."""
    lines = [line for line in text.splitlines() if line.strip()]
    typed = len(lines) <= TYPED_LINES and len(text) <= TYPED_CHARACTERS
    for at in range(len(lines) - 1, max(-1, len(lines) - 1 - LAST_LINES), -1):
        if _STACK.match(lines[at]):
            continue
        for entry, patterns in _entries():
            found = next((m for p in patterns if (m := p.search(lines[at]))), None)
            if found is None or (entry.get("symptom") and not typed):
                continue
            says, do = (_fill(entry.get(f"{key}_{lang}", entry[key]), found) for key in ("says", "do"))
            return Reading(
                entry["name"],
                tuple(entry["rules"]),
                tuple(entry.get("unlike", ())),
                says,
                do,
                lines[at].strip(),
                at,
                bool(entry.get("symptom")),
            )
    return None


def _fill(text: str, found: re.Match) -> str:
    """{group} replaced by what the pattern found; whole numbers with their thousands apart."""
    for name, value in found.groupdict().items():
        text = text.replace("{" + name + "}", f"{int(value):,}" if (value or "").isdigit() else value or "?")
    return text
