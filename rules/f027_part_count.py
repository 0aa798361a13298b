"""F027 part-count: the names of the shards say another number of parts than the index uses.

Why: in `model-00002-of-00007.safetensors` the 7 is the number of parts that were saved. An index that names fewer has
lost some, and one that mixes two numbers joins parts of two saves: the blocks are then of two models.

Do: fetch the index and the shards from one save; where shards were merged or split by hand, name them anew.

False alarms: a tool that drops a shard which no tensor is left in, and keeps the others' names. The weights are then
whole.

Fix safety: safe where all names say one number and every tensor that config.json asks for is there: then nothing was
lost, the parts are numbered anew and the index follows; files are linked, not a byte of a weight is written. Where the
names say two numbers, it goes by name, because the parts may be of two saves. Else manual.

Sources: huggingface/huggingface_hub src/huggingface_hub/serialization/_base.py.
"""

import re

from doctor.lint.rule import Fix, Place, RenameFile, finding, rule
from doctor.lint.testing import rename_parts, tiny

PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")
INDEX = "model.safetensors.index.json"


@rule("F027", "warning", certainty="likely", implied_by=("F010", "F015"))
def part_count(checkpoint, weight_map, files, shards, placement=None):
    sets: dict[str, list[tuple[int, int, str]]] = {}  # by stem: (number, total, file)
    for match in filter(None, map(PART.match, set((weight_map or {}).values()))):
        sets.setdefault(match[1], []).append((int(match[2]), int(match[3]), match[0]))
    whole = placement is not None and placement.spec.family is not None and not placement.missing()
    for stem, parts in sets.items():
        have, totals = {number for number, _, _ in parts}, sorted({total for _, total, _ in parts})
        if len(totals) > 1 or have != set(range(1, totals[-1] + 1)):
            said = " and ".join(f"of {n}" for n in totals)
            yield finding(
                f"the index uses {len(parts)} parts of {stem}, whose names say {said}",
                at=Place(INDEX, pointer="/weight_map"),
                evidence={"used": len(have), "said": totals},
                fix=_number(stem, sorted(parts), len(totals) == 1, files, shards) if whole else BY_HAND,
            )


BY_HAND = Fix("fetch the index and the shards from one save", (), "manual")


def _number(stem, parts, alike, files, shards):
    """1 to n of n: a part whose name is right already keeps it, the others take what is left. By hand where such a name
    is another file's.
    """
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    old = [file for _, _, file in parts if file not in names]
    new = [name for name in names if all(name != file for _, _, file in parts)]
    if any(name in files for name in new) or any(file not in shards for file in old):
        return BY_HAND
    return Fix(
        f"number the {len(parts)} parts anew, 1 to {len(parts)}",
        tuple(RenameFile(a, b) for a, b in zip(old, new, strict=True)),
        "safe" if alike else "unsafe",
        by_name=not alike,
    )


def bad():
    case = tiny()
    case.shards = 2
    case.damage.append(rename_parts("1-of-2", "2-of-3"))
    return case, "the index uses 2 parts of model, whose names say of 2 and of 3"


def good():
    case = tiny()
    case.shards = 2
    return case


def more():
    """Cases whose cures the example above does not show."""
    case = tiny()
    case.shards = 2
    case.damage.append(rename_parts("1-of-4", "3-of-4"))
    yield case
