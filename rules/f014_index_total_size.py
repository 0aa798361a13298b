"""F014 index-total-size: metadata.total_size does not match the shards.

Why: readers use the number for memory planning only, so nothing breaks. But it is wrong only when index and shards are
of different revisions, or when a tool forgot to update it.

Do: rebuild the index. If the difference is large, compare the shards with their source first.

False alarms: tools that count a shared tensor twice. Nothing is read wrongly then, so the severity is only info.

Fix safety: safe: the sum over the headers is exact.

Sources: huggingface/huggingface_hub src/huggingface_hub/serialization/_base.py: total_size is the sum of tensor bytes.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"
FILES = (
    "F001",
    "F002",
    "F003",
    "F004",
    "F005",
    "F006",
    "F007",
    "F008",
    "F009",
    "F010",
    "F011",
    "F013",
    "F015",
    "F016",
    "F028",
)


@rule("F014", "info", implied_by=FILES)
def index_total_size(checkpoint, weight_map, tensors):
    if weight_map is None:
        return
    metadata = (checkpoint.index or {}).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    holds = sum(info.nbytes for info in tensors.values())  # a tensor that two shards hold counts once (F016)
    if isinstance(stated, (int, float)) and stated != holds:
        yield finding(
            _("metadata.total_size is {stated:,} bytes; the shards hold {holds:,}", stated=stated, holds=holds),
            at=Place(INDEX, pointer="/metadata/total_size", note=f"{holds:,}"),
            evidence={"said": stated, "holds": holds},
            fix=Fix(_("rebuild the index from the shards' headers"), (RebuildIndex(),)),
        )


def bad():
    case = tiny()
    case.shards = 2
    holds = sum(a.nbytes for a in case.tensors.values())

    def miscount(folder):
        path = folder / INDEX
        path.write_text(path.read_text().replace(f'"total_size": {holds}', f'"total_size": {holds + 4096}'))

    case.damage.append(miscount)
    return case, f"metadata.total_size is {holds + 4096:,} bytes; the shards hold {holds:,}"


def good():
    case = tiny()
    case.shards = 2
    return case
