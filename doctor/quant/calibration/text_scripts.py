"""The scripts that a text is written in, and those that a vocabulary has many tokens of and the text none.

That is all that can be known about languages without a model of them. The script of a letter is the first word of its
Unicode name (LATIN, CYRILLIC, CJK, HANGUL …). Languages that share a script are not distinguished.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache

SHARE_OF_TEXT = 1 / 50  # of its letters: below it a script is names and quotations
SHARE_OF_VOCABULARY = (
    1 / 20
)  # of the tokens with letters: below it a vocabulary can spell a script and was not made for it
TRACE = 1 / 1000  # of the letters: a script below it is not in the text
_TOKENS = 20_000  # of the vocabulary, at equal distances


@cache
def script(letter: str) -> str:
    """ "Latin", "CJK", … of a letter; "" for what is no letter, or has no name."""
    word = unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""
    return word if word == "CJK" else word.capitalize()


def shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of each script in the letters of texts, most first; empty without letters."""
    counts = Counter(found for text in texts for letter in text if (found := script(letter)))
    return {name: n / counts.total() for name, n in counts.most_common()}


def of_rows(rows: list[list[int]], tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(scripts of the rows, scripts of the vocabulary that they lack)."""
    said = shares(tokenizer.batch_decode(rows, skip_special_tokens=True))
    size = len(tokenizer)
    tokens = tokenizer.batch_decode([[i] for i in range(0, size, max(1, size // _TOKENS))], skip_special_tokens=True)
    first = Counter(found[0] for token in tokens if (found := [s for s in map(script, token) if s]))
    lacking = tuple(
        name
        for name, n in first.most_common()
        if n >= SHARE_OF_VOCABULARY * first.total() and said.get(name, 0) < TRACE
    )
    return tuple(name for name, share in said.items() if share >= SHARE_OF_TEXT), lacking
