"""F027 part-count: number of shards in the index does not match the file names.

Why: in `model-00002-of-00007.safetensors` the 7 is the number of shards that were saved. An index that names fewer has
lost some. An index that mixes two totals joins shards of two saves: its decoder layers belong to two models.

Do: fetch the index and the shards from one save. Where shards were merged or split by hand, rename them.

False alarms: a tool that drops a shard in which no tensor is left and keeps the names of the others. The weights are
then complete.

Fix safety: safe where all names state one total and every tensor that config.json requires is there: nothing was lost,
so the shards are renumbered and the index is updated. Files are linked; no weight is rewritten. Where the names state
two totals, only by name, because the shards may be of two saves. Else manual.

Sources: huggingface/huggingface_hub src/huggingface_hub/serialization/_base.py.
"""

from doctor.lint.rule import Fix, Place, RenameFile, _, finding, listed, parts_of, renumbered, rule
from doctor.lint.testing import rename_parts, tiny

INDEX = "model.safetensors.index.json"


@rule("F027", "warning", certainty="likely", implied_by=("F010", "F015", "F028"))
def part_count(checkpoint, weight_map, files, shards, placement=None):
    whole = placement is not None and placement.spec.family is not None and not placement.missing()
    for stem, parts in parts_of((weight_map or {}).values()).items():
        have = {number for number, _total, _file in parts}
        totals = sorted({total for _number, total, _file in parts})
        if len(totals) > 1 or have != set(range(1, totals[-1] + 1)):
            yield finding(
                _(
                    "the index lists {count} parts of {stem}; their names state a total of {totals}",
                    count=len(parts),
                    stem=stem,
                    totals=listed(map(str, totals)),
                ),
                at=Place(INDEX, pointer="/weight_map"),
                evidence={"used": len(have), "said": totals},
                fix=_renumber(stem, parts, len(totals) == 1, files, shards) if whole else BY_HAND,
            )


BY_HAND = Fix(_("fetch the index and the shards from one save"), (), "manual")


def _renumber(stem, parts, alike, files, shards):
    """Number the parts 1 to n of n; by hand where such a name is another file's."""
    names = renumbered(stem, parts, files)
    if names is None or any(file not in shards for file in names):
        return BY_HAND
    return Fix(
        _("renumber the {count} parts, 1 to {last}", count=len(parts), last=len(parts)),
        tuple(RenameFile(old, new) for old, new in names.items()),
        "safe" if alike else "unsafe",
        by_name=not alike,
    )


def bad():
    case = tiny()
    case.shards = 2
    case.damage.append(rename_parts("1-of-2", "2-of-3"))
    return case, "the index lists 2 parts of model; their names state a total of 2 and 3"


def good():
    case = tiny()
    case.shards = 2
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.shards = 2
    case.damage.append(rename_parts("1-of-4", "3-of-4"))
    yield case
