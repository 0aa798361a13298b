"""F018 shards-without-index: shards have no index.

Why: transformers and most tools look for model.safetensors or for the index, find neither, and report that there are no
weights. A missing shard goes unnoticed.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- transformers: `does not appear to have a file named`

Do: rebuild the index when all shards are there; else fetch the missing ones first.

False alarms: none known: the file names themselves state the total ("of N").

Fix safety: safe when every shard is there; a missing shard must be fetched.

Sources: transformers src/transformers/modeling_utils.py, `_get_resolved_checkpoint_files`.
"""

import re

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, rule
from doctor.lint.testing import tiny

PART = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.safetensors$")
INDEX = "model.safetensors.index.json"


@rule("F018", "error", implied_by=("F015",))
def shards_without_index(checkpoint, files, weight_map):
    if weight_map is not None or checkpoint.only:
        return
    sets: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(PART.match, files)):
        sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, total), have in sets.items():
        if f"{stem}.safetensors" in files or (stem != "model" and "model.safetensors" in files):
            continue
        lost = sorted(set(range(1, total + 1)) - have)
        first = f"{stem}-{min(have):05d}-of-{total:05d}.safetensors"
        if lost:
            numbers = ", ".join(map(str, lost[:5]))
            yield finding(
                _(
                    "{have} of {total} parts of {stem} exist and no index; missing: {numbers}",
                    have=len(have),
                    total=total,
                    stem=stem,
                    numbers=numbers,
                )
                if len(lost) <= 5
                else _(
                    "{have} of {total} parts of {stem} exist and no index; missing: {numbers} and {more} more",
                    have=len(have),
                    total=total,
                    stem=stem,
                    numbers=numbers,
                    more=len(lost) - 5,
                ),
                at=Place(first),
                evidence={"present": len(have), "total": total},
                fix=Fix(_("fetch the missing parts and the index"), (), "manual"),
            )
        else:
            yield finding(
                _("{total} parts of {stem} exist, but no {index}", total=total, stem=stem, index=INDEX),
                at=Place(first),
                evidence={"total": total},
                fix=Fix(_("write the index from the shards' headers"), (RebuildIndex(),)),
            )


def bad():
    case = tiny()
    case.shards = 2
    case.damage.append(lambda folder: (folder / INDEX).unlink())
    return case, f"2 parts of model exist, but no {INDEX}"


def good():
    case = tiny()
    case.shards = 2
    return case
