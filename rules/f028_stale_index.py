"""F028 stale-index: the index is of another save; no tensor is missing.

Why: the index names files that do not exist, or places tensors in the wrong ones, and every tensor that it lists is in
a shard that exists. The model was saved again, or its shards were merged, and the old index stayed. Readers take the
list of files from the index alone and stop.

Seen as:
- transformers: `does not appear to have a file named`
- vLLM: `Cannot find any model weights with`

Do: rebuild the index from the shards' headers. Nothing needs to be downloaded.

False alarms: none known: every tensor of the index was found in the header of a shard.

Fix safety: safe: the headers state which shard holds each tensor. Shards whose names state another number than there
are get the numbers 1 to n, so that no reader looks for more.

Sources: transformers src/transformers/utils/hub.py, `get_checkpoint_shard_files`.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, RenameFile, _, finding, parts_of, plural, renumbered, rule
from doctor.lint.testing import rename_parts, tiny

INDEX = "model.safetensors.index.json"


@rule("F028", "error", implied_by=("F015", "F016", "F019", "F024"))
def stale_index(checkpoint, weight_map, shards, missing_shards, copies, files):
    if not weight_map:
        return
    held = {t.name: file for file, shard in shards.items() if not shard.defects for t in shard.tensors}
    wrong = [n for n, file in weight_map.items() if held.get(n) != file]
    listed = len(weight_map)
    if not wrong or not all(n in held for n in wrong) or any(n in copies for n in wrong):
        return
    if missing_shards:
        text = plural(
            "the index names {n:,} file that does not exist, such as {file}; the {total:,} tensors that it lists are "
            "all in the {shards:,} shards that exist",
            "the index names {n:,} files that do not exist, such as {file}; the {total:,} tensors that it lists are "
            "all in the {shards:,} shards that exist",
            len(missing_shards),
            file=missing_shards[0],
            total=listed,
            shards=len(shards),
        )
    elif 2 * len(wrong) >= listed:
        text = _(
            "the index places {count:,} of {total:,} tensors in shards that do not hold them; other shards do",
            count=len(wrong),
            total=listed,
        )
    else:
        return
    yield finding(
        text,
        at=Place(INDEX, pointer="/weight_map"),
        evidence={"wrong": len(wrong), "tensors": listed},
        fix=Fix(_("rebuild the index from the shards' headers"), (*_numbers(shards, files), RebuildIndex())),
    )


def _numbers(shards, files):
    """Renamings of shards whose names state another number of shards than there are; none where a name is taken."""
    edits = []
    for stem, parts in parts_of(shards).items():
        if {total for _number, total, _file in parts} != {len(parts)}:
            edits += [RenameFile(old, new) for old, new in (renumbered(stem, parts, files) or {}).items()]
    return edits


def bad():
    case = tiny()
    case.shards = 2

    def plant(folder):
        rename_parts("1-of-3", "2-of-3")(folder)
        path = folder / INDEX
        text = path.read_text()
        name = sorted(case.tensors)[0]
        path.write_text(
            text.replace(f'"{name}": "model-00001-of-00003', f'"{name}": "model-00003-of-00003'), encoding="utf-8"
        )

    case.damage.append(plant)
    total = len(case.tensors)
    return case, (
        f"the index names 1 file that does not exist, such as model-00003-of-00003.safetensors; the {total} tensors "
        "that it lists are all in the 2 shards that exist"
    )


def good():
    case = tiny()
    case.shards = 2
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.shards = 2

    def swap(folder):
        path = folder / INDEX
        text = path.read_text().replace("00001-of", "0000X-of").replace("00002-of", "00001-of")
        path.write_text(text.replace("0000X-of", "00002-of"), encoding="utf-8")

    case.damage.append(swap)
    yield case
