"""What the quantizer asks of the program that will read its output. doctor.evaluate.clients makes one; tests may go
without.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from doctor.core.recipe import Recipe
from doctor.core.records import LoadProof
from doctor.core.rehearsal import Rehearsal

Linears = Mapping[str, tuple[str, ...]]  # a client's Linear module -> modules of the files that it is loaded from


@dataclass(frozen=True)
class Client:
    """linears: the Linear modules of the class that config.json of a directory names, each with those of the given
    modules of the files that the client loads into it, () where it cannot say; {} where it cannot build the class.
    prove: what the client does with a finished directory. rehearse: what would become of a run of this recipe on the
    checkpoint in a directory, before it; None where that is not asked.
    """

    linears: Callable[[Path, Iterable[str]], Linears]
    prove: Callable[[Path], LoadProof]
    rehearse: Callable[[Path, Recipe], Rehearsal] | None = None


def plain_linears(linears: Linears, packed: Iterable[str]) -> list[str]:
    """Those Linear modules of a client that are loaded from no packed linear of the files, under the client's names."""
    packed = list(packed)
    if any(linears.values()):
        inside = set(packed)
        return [name for name, sources in linears.items() if inside.isdisjoint(sources)]
    return not_packed(linears, packed)


def not_packed(linears: Iterable[str], packed: Iterable[str]) -> list[str]:
    """Those Linear modules of a class that stand for no packed linear of the files, under the client's names.

    A client's name may differ from the files' in front: `model.language_model.layers.0.mlp.up_proj` is stored as
    `language_model.model.layers.0.mlp.up_proj`. Packed linears of one list of layers are those of the client's list
    that has most of them; where two lists have as many, of both. A linear outside such lists stands for the modules
    that share most of its end.
    """
    names, packed = list(linears), list(packed)
    known, lists = set(names), _lists(names)
    taken = known & set(packed)
    for inner in _lists(name for name in packed if name not in known).values():
        held = {stem: inner.keys() & own.keys() for stem, own in lists.items()}
        most = max(map(len, held.values()), default=0)
        taken |= {lists[stem][name] for stem, own in held.items() if len(own) == most for name in own}
    for name in packed:
        if name not in known and _NUMBER.search(name) is None:
            likeness = {module: _alike(module, name) for module in names}
            most = max(likeness.values(), default=0)
            taken |= {module for module, share in likeness.items() if share == most > 1}
    return [name for name in names if name not in taken]


_NUMBER = re.compile(r"\.(?=\d+\.)")  # before a layer's number


def _lists(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Modules of lists of layers: what stands before the number -> the rest from the number on -> the whole name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        parts = _NUMBER.split(name, maxsplit=1)
        if len(parts) == 2:
            found.setdefault(parts[0], {})[parts[1]] = name
    return found


def _alike(module: str, name: str) -> int:
    """How many parts both end with."""
    left, right = module.split("."), name.split(".")
    same = 0
    while same < min(len(left), len(right)) and left[-1 - same] == right[-1 - same]:
        same += 1
    return same
