"""F057 unmerged-adapter: the weight files hold LoRA matrices beside the weights they change.

Why: readers of the base family drop lora_A and lora_B, and with them the fine-tuning; where the weight itself is called
`base_layer.weight`, they find no weight at all.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- vLLM: `KeyError: 'model.layers.`

Do: load with PEFT, `merge_and_unload()`, save again.

False alarms: none known; models with low-rank linears of their own (DeepSeek) use other names.

Fix safety: manual; the scale of the merge stands in adapter_config.json, which is not with these tensors. An adapter of its own is F022.

Sources: huggingface/peft src/peft/tuners/lora/layer.py.

标题: 权重文件里 LoRA 矩阵与被它修改的权重放在一起

原因: 基座系列的读取程序会丢弃 lora_A 和 lora_B，微调成果随之消失；若权重名是 `base_layer.weight`，则一个权重
也找不到。

处理: 用 PEFT 加载，`merge_and_unload()`，再保存。

误报: 暂无已知；本身就有低秩线性层的模型（DeepSeek）用的是别的名字。

修复: 需手动；合并是矩阵求和，其系数写在 adapter_config.json 里。
"""

import re

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

LORA = re.compile(r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)(\.|$)|^base_model\.model\.")
# What every such name holds: one look at all names, since a large model has 50,000.
MARKS = ("lora_", "base_layer", "modules_to_save", "base_model.model.")


@rule("F057", "error", implied_by=("F022",))
def unmerged_adapter(checkpoint, tensors):
    text = "\n".join(tensors)
    found = sorted(n for n in tensors if LORA.search(n)) if any(mark in text for mark in MARKS) else []
    if found:
        info = tensors[found[0]]
        noun = "tensor is" if len(found) == 1 else "tensors are"
        yield finding(f"{len(found):,} {noun} an adapter's that was not merged, the first is {found[0]}", at=Place(info.shard, tensor=found[0]),
                      evidence={"tensors": len(found)}, fix=Fix("merge the adapter with PEFT's merge_and_unload() and save again", (), "manual"))


def bad():
    case = tiny()
    stem = case.name("down").removesuffix(".weight")
    extra = {f"{stem}.lora_A.weight": case.down()[:8].copy(), f"{stem}.lora_B.weight": case.down()[:, :8].copy()}
    case.tensors |= extra
    case.dtypes |= dict.fromkeys(extra, "BF16")
    return case, f"2 tensors are an adapter's that was not merged, the first is {stem}.lora_A.weight"


def good():
    return tiny()
