"""F011 index-names-absent-tensor: the index places a tensor in a file that does not hold it, nor does any other.

Why: the weight is lost, or the index is of another revision. transformers fills the gap with random numbers and prints
one line.

Seen as:
- transformers: `were not initialized from the model checkpoint at`
- safetensors: `SafetensorError: File does not contain tensor`
- vLLM: `KeyError: 'model.layers.`

Do: fetch index and shards of one and the same revision.

False alarms: an index that was left as it was after a tensor was dropped on purpose (a tied lm_head): then rebuild it.

Fix safety: unsafe: an index rebuilt from the files no longer says that a tensor is missing.

Sources: transformers src/transformers/modeling_utils.py; huggingface/safetensors bindings/python/src/lib.rs.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, finding, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"
FILES = ("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F010")


@rule("F011", "error", implied_by=FILES)
def index_names_absent_tensor(checkpoint, weight_map, shards):
    held = {t.name for shard in shards.values() for t in shard.tensors}
    for name, file in (weight_map or {}).items():
        if name not in held:
            pointer = "/weight_map/" + name.replace("~", "~0").replace("/", "~1")
            yield finding(
                f"the index places {name} in {file}, but no shard holds it",
                at=Place(INDEX, pointer=pointer),
                evidence={"tensor": name, "file": file},
                fix=Fix("rebuild the index from the shards' headers", (RebuildIndex(),), "unsafe"),
                advice="fetch index and shards of one revision; rebuild only if the tensor was dropped on purpose",
            )


def bad():
    case = tiny()
    case.shards = 2

    def plant(folder):
        path = folder / INDEX
        text = path.read_text().replace(
            '"weight_map": {', '"weight_map": {\n    "model.extra.weight": "model-00001-of-00002.safetensors",'
        )
        path.write_text(text)

    case.damage.append(plant)
    return case, "the index places model.extra.weight in model-00001-of-00002.safetensors, but no shard holds it"


def good():
    case = tiny()
    case.shards = 2
    return case
