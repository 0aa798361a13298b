"""The weight formats that are known, and what is asked of all of them at once.

A format enters here when its module is imported; the package's __init__ imports them in the order in which people are
shown them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from doctor.core.recipe import FORMATS, Recipe, Scheme
from doctor.formats.base import Format, Quantization

KNOWN: dict[str, Format] = {}  # every format, those that are only read too
F = TypeVar("F", bound=type[Format])


def register(cls: F) -> F:
    """Class decorator: make a format known under its name."""
    form = cls()
    KNOWN[form.name] = form
    if form.writes:
        FORMATS.add(form)
    _look_again()
    return cls


def forget(name: str) -> None:
    """Take a format out again."""
    KNOWN.pop(name, None)
    FORMATS.remove(name)
    _look_again()


def _look_again() -> None:
    word_tails.cache_clear()
    sampled_tails.cache_clear()
    verbatim_tails.cache_clear()
    scale_tails.cache_clear()
    _bytes.cache_clear()


def format_of(recipe: Recipe) -> Format:
    """The format that a recipe writes."""
    return KNOWN[recipe.output_format]


def stored_bytes(recipe: Recipe, linear: str, in_features: int, out_features: int) -> int:
    """Bytes of a linear's tensors, as its own part of the recipe stores it."""
    own = recipe.for_linear(linear)
    return _bytes(own.output_format, in_features, out_features, own.scheme)


@cache
def _bytes(form: str, in_features: int, out_features: int, scheme: Scheme) -> int:
    """A mixture has tens of thousands of linears of a handful of sizes."""
    return KNOWN[form].bytes(in_features, out_features, scheme)


@cache
def word_tails() -> tuple[str, ...]:
    """Endings of names of tensors that hold codes instead of weights."""
    return tuple(f".{words}" for words in dict.fromkeys(f.words for f in KNOWN.values()) if words)


@cache
def sampled_tails() -> tuple[str, ...]:
    """Endings of names of int32 tensors whose values `check` looks at."""
    return tuple(f".{part}" for part in dict.fromkeys(p for f in KNOWN.values() for p in f.sampled))


@cache
def verbatim_tails() -> tuple[str, ...]:
    """Endings of names of small tensors whose bytes `check` keeps: descriptions that lie among the weights."""
    return tuple(f".{part}" for part in dict.fromkeys(p for f in KNOWN.values() for p in f.verbatim))


@cache
def scale_tails() -> tuple[str, ...]:
    """Endings of names of tensors that hold scales of weights."""
    return tuple(f".{part}" for part in dict.fromkeys(p for f in KNOWN.values() for p in f.scale_names))


def format_of_words(name: str) -> Format | None:
    """The first format whose words a tensor of this name could be."""
    tail = name.rpartition(".")[2]
    return next((f for f in KNOWN.values() if f.words == tail), None)


def read_quantization(raw: Mapping[str, Any], file: str, pointer: str, own: bool = True) -> Quantization:
    """What a quantization_config says; see Format.read. Raises Unavailable where no format claims it."""
    reader = next((f for f in KNOWN.values() if f.claims(raw)), None)
    return (reader or Format()).read(raw, file, pointer, own)
