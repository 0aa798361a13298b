"""F015 broken-index: index is not JSON, or its weight_map or metadata is unusable.

Why: when an index exists, readers take the list of shards from it alone.

Seen as:
- transformers: `KeyError: 'metadata'`
- transformers: `KeyError: 'weight_map'`
- transformers: `json.decoder.JSONDecodeError`

Do: rebuild the index from the shards' headers.

False alarms: none known.

Fix safety: safe: every entry of an index follows from the headers.

Sources: transformers src/transformers/utils/hub.py, `get_checkpoint_shard_files`; tried with transformers 5.23.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, plural, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"


@rule("F015", "error")
def broken_index(checkpoint, json_files):
    file = json_files.get(INDEX)
    if file is None or file.raw.startswith(b"version https://git-lfs"):
        return
    fix = Fix(_("rebuild the index from the shards' headers"), (RebuildIndex(),))
    if file.broken is not None:
        yield finding(_("{file}: {detail}", file=INDEX, detail=file.broken.args[0]), at=Place(INDEX), fix=fix)
        return
    value = file.value
    mapping = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(mapping, dict):
        yield finding(
            _("{file} has no weight_map; it must map each tensor to its shard", file=INDEX),
            at=Place(INDEX, pointer=""),
            fix=fix,
        )
        return
    if not isinstance(value.get("metadata"), dict):
        yield finding(
            _("{file} has no metadata; transformers stops with KeyError: 'metadata'", file=INDEX),
            at=Place(INDEX, pointer=""),
            fix=fix,
        )
    odd = [
        name
        for name, where in mapping.items()
        if not isinstance(where, str) or "/" in where or "\\" in where or where.startswith("..")
    ]
    if odd:
        yield finding(
            plural(
                "{n:,} entry of weight_map is not a file name: {first} -> {value!r}",
                "{n:,} entries of weight_map are not file names; the first is {first} -> {value!r}",
                len(odd),
                first=odd[0],
                value=str(mapping[odd[0]])[:60],
            ),
            at=Place(INDEX, pointer="/weight_map"),
            evidence={"entries": len(odd)},
            fix=fix,
        )


def bad():
    case = tiny()
    case.shards = 2

    def strip(folder):
        import json

        path = folder / INDEX
        document = json.loads(path.read_text())
        del document["metadata"]
        path.write_text(json.dumps(document))

    case.damage.append(strip)
    return case, f"{INDEX} has no metadata; transformers stops with KeyError: 'metadata'"


def good():
    case = tiny()
    case.shards = 2
    return case
