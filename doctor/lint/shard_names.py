"""Names of shards, `model-00002-of-00007.safetensors`: what their numbers say, and names that say the truth."""

import re
from collections.abc import Collection, Iterable

PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")


def parts_of(names: Iterable[str]) -> dict[str, list[tuple[int, int, str]]]:
    """Stem -> (number, stated total, file) of each shard, in order; files with other names are left out."""
    sets: dict[str, list[tuple[int, int, str]]] = {}
    for match in filter(None, map(PART.match, sorted(set(names)))):
        sets.setdefault(match[1], []).append((int(match[2]), int(match[3]), match[0]))
    return {stem: sorted(parts) for stem, parts in sets.items()}


def renumbered(stem: str, parts: list[tuple[int, int, str]], taken: Collection[str]) -> dict[str, str] | None:
    """Old name -> new name, so that the parts are numbered 1 to n of n: a part whose name is already right keeps it,
    the others take the free names. None where such a name is another file's.
    """
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    have = [file for _number, _total, file in parts]
    old = [file for file in have if file not in names]
    new = [name for name in names if name not in have]
    return None if any(name in taken for name in new) else dict(zip(old, new, strict=True))
