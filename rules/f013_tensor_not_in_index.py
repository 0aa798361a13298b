"""F013 tensor-not-in-index: tensor in a shard is missing from the index.

Why: transformers still loads it. Readers that follow the index never see it, and the model lacks a weight there.

Do: rebuild the index from the shards' headers.

False alarms: a tensor that was left in the shard on purpose and removed from the index.

Fix safety: safe: an index that names every tensor changes nothing for readers that open whole files.

Sources: transformers src/transformers/utils/hub.py, `get_checkpoint_shard_files`; vllm-project/vllm
vllm/model_executor/model_loader/weight_utils.py.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"


@rule("F013", "warning", implied_by=("F015",))
def tensor_not_in_index(checkpoint, weight_map, shards):
    if not weight_map:
        return
    for file, shard in shards.items():
        for info in shard.tensors:
            if info.name not in weight_map:
                yield finding(
                    _("{tensor} is in {file} but not in the index", tensor=info.name, file=file),
                    at=Place(INDEX, pointer="/weight_map", note=info.name),
                    evidence={"tensor": info.name, "file": file},
                    fix=Fix(_("rebuild the index from the shards' headers"), (RebuildIndex(),)),
                )


def bad():
    case = tiny()
    case.shards = 2
    name = sorted(case.tensors)[0]

    def forget(folder):
        path = folder / INDEX
        path.write_text(path.read_text().replace(f'"{name}": "model-00001-of-00002.safetensors",', ""))

    case.damage.append(forget)
    return case, f"{name} is in model-00001-of-00002.safetensors but not in the index"


def good():
    case = tiny()
    case.shards = 2
    return case
