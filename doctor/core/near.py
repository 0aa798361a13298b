"""The nearest known words to one that is not known, for errors."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from doctor.core.messages import _, listed


def nearest(word: str, known: Iterable[str], most: int = 3) -> str:
    """`Did you mean gptq?`, "" where nothing is near."""
    words = {w.lower(): w for w in known}
    near = [words[w] for w in get_close_matches(word.lower(), words, n=most, cutoff=0.6)]
    return _("Did you mean {near}?", near=listed(near)) if near else ""
