"""F011 index-names-absent-tensor: tensor named in the index is in no shard.

Why: the weight is lost, or the index belongs to another revision. transformers fills the gap with random numbers and
prints one line.

Seen as:
- transformers: `were not initialized from the model checkpoint at`
- safetensors: `SafetensorError: File does not contain tensor`
- vLLM: `KeyError: 'model.layers.`

Do: download index and shards of the same revision.

False alarms: an index that was not updated when a tensor was dropped on purpose (a tied lm_head): rebuild it.

Fix safety: unsafe: an index rebuilt from the shards no longer shows that a tensor is missing.

Sources: transformers src/transformers/modeling_utils.py; huggingface/safetensors bindings/python/src/lib.rs.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"
FILES = ("F001", "F002", "F003", "F004", "F005", "F006", "F007", "F010")


@rule("F011", "error", implied_by=FILES)
def index_names_absent_tensor(checkpoint, weight_map, shards):
    if not weight_map:
        return
    held = {t.name for shard in shards.values() for t in shard.tensors}
    for name, file in weight_map.items():
        if name not in held:
            pointer = "/weight_map/" + name.replace("~", "~0").replace("/", "~1")
            yield finding(
                _("the index places {tensor} in {file}, but no shard holds it", tensor=name, file=file),
                at=Place(INDEX, pointer=pointer),
                evidence={"tensor": name, "file": file},
                fix=Fix(_("rebuild the index from the shards' headers"), (RebuildIndex(),), "unsafe"),
                advice=_("fetch index and shards of one revision; rebuild only if the tensor was dropped on purpose"),
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
