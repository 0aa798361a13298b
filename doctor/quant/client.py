"""What the quantizer asks of the program that will read its output. doctor.evaluate.clients makes one; tests may go
without.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from doctor.core.records import LoadProof


@dataclass(frozen=True)
class Client:
    """linears: names of all Linear modules of the class that config.json of a directory names, () where the client
    cannot say. prove: what the client does with a finished directory.
    """

    linears: Callable[[Path], tuple[str, ...]]
    prove: Callable[[Path], LoadProof]


def not_packed(linears: Iterable[str], packed: Iterable[str]) -> list[str]:
    """Those Linear modules of a class that stand for no packed linear of the files, under the client's names.

    A client's name may differ from the files' in front: `model.language_model.layers.0.mlp.up_proj` is stored as
    `language_model.model.layers.0.mlp.up_proj`. A packed linear stands for the module that shares most of its end and,
    of those, most of its other parts; where two share as much, for both.
    """
    names = list(linears)
    known = set(names)
    by_end: dict[str, list[str]] = {}
    for name in names:
        by_end.setdefault(_end(name), []).append(name)
    taken = set()
    for name in packed:
        if name in known:
            taken.add(name)
            continue
        found = by_end.get(_end(name), [])
        likeness = {module: _likeness(module, name) for module in found}
        taken |= {module for module, share in likeness.items() if share == max(likeness.values())}
    return [name for name in names if name not in taken]


def _end(name: str) -> str:
    """The last two parts of a name, which no client changes."""
    return ".".join(name.split(".")[-2:])


def _likeness(module: str, name: str) -> tuple[int, int]:
    """(parts that both end with, parts that both have)."""
    left, right = module.split("."), name.split(".")
    same = 0
    while same < min(len(left), len(right)) and left[-1 - same] == right[-1 - same]:
        same += 1
    return same, len(set(left) & set(right))
