"""The nearest known words to one that is not known, for errors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from doctor.core.messages import _


def nearest(word: str, known: Iterable[str], most: int = 3) -> str:
    """`Did you mean gptq?`, "" where nothing is near."""
    words = {w.lower(): w for w in known}
    near = [words[w] for w in get_close_matches(word.lower(), words, n=most, cutoff=0.6)]
    return _("Did you mean {near}?", near=", ".join(near)) if near else ""


def nearest_codes(word: str, codes: Iterable[str], most: int = 3) -> str:
    """`Did you mean W214?` of codes of one letter and a number, by the number; "" for a word that is no code, or where
    no code has its letter.
    """
    if not re.fullmatch(r"[A-Za-z]\d{3}", word):
        return ""
    same = [code for code in codes if code[0] == word[0].upper()]
    near = sorted(same, key=lambda code: (abs(int(code[1:]) - int(word[1:])), code))[:most]
    return _("Did you mean {near}?", near=", ".join(near)) if near else ""
