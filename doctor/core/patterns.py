"""Patterns that files bring, matched within a limit of time: pattern and name may be made to take for ever."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _

SECONDS = 0.5  # for one name; an honest pattern takes microseconds


class Pattern:
    """A pattern in the syntax of `re`. Raises re.error for what is none."""

    def __init__(self, text: str):
        import regex  # it costs milliseconds, and most checkpoints bring no pattern

        self.text = text
        try:
            re.compile(text)  # the clients' own parser says what is a pattern
            self._compiled: Any = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise re.error(str(error) or type(error).__name__) from None

    def match(self, name: str) -> bool:
        """Whether a name begins with what the pattern says. Raises BadCheckpoint where that takes too long."""
        try:
            return self._compiled.match(name, timeout=SECONDS) is not None
        except TimeoutError:
            raise BadCheckpoint(
                _(
                    "config: the pattern {pattern!r} takes more than {seconds} s on the name {name!r}.",
                    pattern=self.text[:80],
                    seconds=SECONDS,
                    name=name[:80],
                ),
                _("No reader comes to its end: write the names out."),
            ) from None


@cache
def pattern_of(text: str) -> Pattern | None:
    """The pattern of a text, None where it is none."""
    try:
        return Pattern(text)
    except re.error:
        return None
