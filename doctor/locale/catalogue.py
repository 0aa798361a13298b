"""Messages in the reader's language, by gettext: a catalogue for each, LANGUAGE/LC_MESSAGES/doctor.po beside this file.

`with language("zh"):` decides what `translated` and `say` give. What a catalogue lacks appears in English and is
counted (`untranslated`), so neither a rule nor a screen has to be translated before it is merged. `make translations`
brings the catalogues up to date with the code.
"""

from __future__ import annotations

import gettext
import io
import locale
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from doctor.core.messages import Message, _, plural

HOME = Path(__file__).parent
SOURCE = "doctor.po"  # its file name, and in a .mo the id under which the SHA-256 of the .po stands
LANGUAGES = ("en", *sorted(p.parents[1].name for p in HOME.glob(f"*/LC_MESSAGES/{SOURCE}")))
_WORDS = re.compile(r"[A-Za-z]{2,} [A-Za-z]{2,}")
_current: ContextVar[str] = ContextVar("language", default="en")
_missing: ContextVar[Counter[str]] = ContextVar("missing")


def current() -> str:
    """The language that is set, "en" without one."""
    return _current.get()


@contextmanager
def language(lang: str) -> Iterator[Counter[str]]:
    """Inside it, what is shown is in this language; the counter that it gives holds what had to be shown in English.

    Raises ValueError for a language that has no catalogue.
    """
    if lang not in LANGUAGES:
        raise ValueError(f"language {lang!r}: must be one of {', '.join(LANGUAGES)}")
    missing: Counter[str] = Counter()
    tokens = _current.set(lang), _missing.set(missing)
    try:
        yield missing
    finally:
        _current.reset(tokens[0])
        _missing.reset(tokens[1])


def from_environment() -> str:
    """The language of the locale, by POSIX's order: the first of LC_ALL, LC_MESSAGES and LANG that is set decides."""
    named = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    spoken = locale.normalize(named).lower()
    return next((lang for lang in LANGUAGES if spoken.startswith(lang)), "en")


def untranslated() -> Counter[str]:
    """English text -> how often it was shown since the language was set, although another language was asked for."""
    return _missing.get(Counter())


def translated(text: str, lang: str | None = None) -> str:
    """A message in a language (without `lang`, the one that is set); a plain str is looked up whole."""
    lang = lang or current()
    if lang == "en":
        return str(text)
    found = catalogue(lang)

    def look_up(template: str, many: str, n: int) -> str:
        said = found.ngettext(template, many, n) if many else found.gettext(template) if template else ""
        return said or _english(template, many, n)

    if isinstance(text, Message):
        return text.rendered(look_up)
    return found.gettext(text) or _plain(text) if text else ""


def say(template: str, /, **values: Any) -> str:
    """A sentence of a screen in the language that is set, with its values."""
    return translated(_(template, **values))


def counted(one: str, many: str, n: int, /, **values: Any) -> str:
    """`1 rule`, `3 rules` in the language that is set; both templates may name {n}."""
    return translated(plural(one, many, n, **values))


def has(template: str, lang: str) -> bool:
    """Whether a catalogue translates this template."""
    return bool(catalogue(lang).gettext(template))


@cache
def catalogue(lang: str) -> gettext.NullTranslations:
    """The compiled catalogue of a language: `gettext` and `ngettext` give "" for what it lacks.

    The compiled file is used where it was made from the .po beside it; else the .po is compiled in memory, which takes
    Babel. Without Babel an old file is better than none; stderr says that it is old, or that there is none.
    """
    po = HOME / lang / "LC_MESSAGES" / SOURCE
    mo = po.with_suffix(".mo")
    source = po.read_bytes() if po.exists() else b""
    import hashlib  # English needs none

    stored = _read(mo.read_bytes()) if mo.exists() else None
    if stored is not None and (not source or stored.gettext(SOURCE) == hashlib.sha256(source).hexdigest()):
        return stored
    try:
        from doctor.locale.compile import compiled
    except ImportError:
        what = f"was made from another {SOURCE}" if stored else "is not there: texts appear in English"
        print(f"doctor: {mo} {what}. Install Babel, or install the package again.", file=sys.stderr)
        return stored or _read(b"")
    return _read(compiled(source))


class _Lacks(gettext.NullTranslations):
    """Behind every catalogue: what is not in it."""

    def gettext(self, message: str) -> str:
        return ""

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        return ""


def _read(mo: bytes) -> gettext.NullTranslations:
    if not mo:
        return _Lacks()
    found = gettext.GNUTranslations(io.BytesIO(mo))
    found.add_fallback(_Lacks())
    return found


def _english(template: str, many: str, n: int) -> str:
    if template not in (", ", " and "):
        untranslated()[template] += 1
    return many if many and n != 1 else template


def _plain(text: str) -> str:
    """A text that is no message; counted where it reads like one."""
    if _WORDS.search(text):
        untranslated()[text] += 1
    return text
