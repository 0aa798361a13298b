"""Modules that a quantization_config leaves in floats, entry by entry, as each format's readers match names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from doctor.core.patterns import pattern_of

_SIGNS = re.compile(r"[*?\[\]^$|()\\+]")


@dataclass(frozen=True)
class Exclusion:
    """One entry. entry: as it is written, "" for what holds without one. pointer: of the entry, from the
    quantization_config on. pattern: whether it is one, and not a name or a part of one.
    """

    entry: str
    pointer: str
    matches: Callable[[str], bool]
    pattern: bool = True
    broken: bool = False  # a pattern that does not compile: readers stop at it

    @classmethod
    def of_part(cls, entry: str, pointer: str) -> Exclusion:
        """An entry that is a part of a name."""
        return cls(entry, pointer, lambda module: entry in module, False)

    @classmethod
    def of_pattern(cls, entry: str, pointer: str, pattern: str) -> Exclusion:
        """An entry that must match from the beginning of a name; one that is no pattern matches nothing."""
        found = pattern_of(pattern)
        return cls(entry, pointer, found.match if found else lambda module: False, broken=found is None)

    @classmethod
    def of_words(cls, entry: str, pointer: str, matches: Callable[[str], bool]) -> Exclusion:
        """An entry that is a pattern only where it has a pattern's signs."""
        return cls(entry, pointer, matches, _SIGNS.search(entry) is not None)

    def names(self, module: str) -> bool:
        """Whether it means this module in every reader: a part of a name must be whole words between dots."""
        whole = f".{self.entry.strip('.')}." in f".{module}."
        return self.matches(module) and (self.pattern or whole)


def leaves_out(entry: str, module: str) -> bool:
    """Whether transformers keeps a module in floats by an entry of a list: a module, the modules in it, and names that
    end so (quantizers_utils.py, should_convert_module).
    """
    if module.endswith(entry):
        return True
    found = pattern_of(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    return found is not None and found.match(module)
