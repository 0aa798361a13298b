"""F012 index-names-wrong-shard: index names the wrong shard for a tensor.

Why: transformers reads every listed shard and does not notice. vLLM and tools that read tensor by tensor follow the
index and stop, or lose the tensor.

Seen as:
- safetensors: `SafetensorError: File does not contain tensor`
- vLLM: `Following weights were not initialized from checkpoint`

Do: rebuild the index from the shards' headers; the result is exact.

False alarms: none known.

Fix safety: safe: the headers state which shard holds each tensor.

Sources: vllm-project/vllm vllm/model_executor/model_loader/weight_utils.py, `filter_duplicate_safetensors_files`.
"""

from doctor.lint.rule import Fix, Place, RebuildIndex, _, finding, rule
from doctor.lint.testing import tiny

INDEX = "model.safetensors.index.json"


@rule("F012", "error", implied_by=("F028",))
def index_names_wrong_shard(checkpoint, weight_map, shards):
    if not weight_map:
        return
    held: dict[str, list[str]] = {}
    for file, shard in shards.items():
        for info in shard.tensors:
            held.setdefault(info.name, []).append(file)
    for name, file in weight_map.items():
        if name in held and file in shards and file not in held[name] and not shards[file].defects:
            pointer = "/weight_map/" + name.replace("~", "~0").replace("/", "~1")
            yield finding(
                _("the index places {tensor} in {file}; it is in {found}", tensor=name, file=file, found=held[name][0]),
                at=Place(INDEX, pointer=pointer),
                evidence={"tensor": name, "said": file, "is": held[name][0]},
                fix=Fix(_("rebuild the index from the shards' headers"), (RebuildIndex(),)),
            )


def bad():
    case = tiny()
    case.shards = 2
    name = sorted(case.tensors)[0]
    right, wrong = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def swap(folder):
        path = folder / INDEX
        path.write_text(path.read_text().replace(f'"{name}": "{right}"', f'"{name}": "{wrong}"'))

    case.damage.append(swap)
    return case, f"the index places {name} in {wrong}; it is in {right}"


def good():
    case = tiny()
    case.shards = 2
    return case
