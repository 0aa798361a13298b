"""Q416 stacked-experts-kept: experts that lie in one 3-D tensor were left in 16 bits.

Why: most of a mixture's weights are its experts. Where a checkpoint stores them as one tensor [experts, out, in], a run over
linears passes them by, and the output is nearly as large as the input although its config says 4 bits.

Seen as:
- GPTQModel: a quantized GPT-OSS or Llama 4 of nearly its old size
- AutoAWQ: experts that no line of the log mentions

Do: convert the checkpoint to one linear an expert (transformers' older layout of the family), or serve what is there: engines are
told that these modules are in 16 bits.

False alarms: none; it reports what was done.

Fix safety: no fix: the layout of a checkpoint is its publisher's choice.

Sources: huggingface/transformers src/transformers/models/gpt_oss/modeling_gpt_oss.py (GptOssExperts);
src/transformers/models/llama4/modeling_llama4.py (Llama4TextExperts).

标题: 堆叠成三维张量的专家留在 16 位

原因: 混合专家模型的大部分权重是专家。检查点若把它们存成一个 [experts, out, in] 张量，按线性层量化就会略过；输出几乎与输入一样大，而 config 写着 4 位。

处理: 把检查点转换为每个专家一个线性层，或按现状使用：输出已告知推理引擎这些模块是 16 位。

误报: 无；如实报告所做的事。

修复: 不提供修复：检查点的布局由发布者决定。
"""

from doctor.rule import finding, rule
from doctor.testing import measured


@rule("Q416", "warning")
def stacked_experts_kept(checkpoint, stacked_experts):
    for name, why in stacked_experts:
        yield finding(f"{name} stays in 16 bits: {why}", advice="convert the experts to linears of their own")


def bad():
    case = measured()
    case.put("checkpoint:", "stacked_experts", (("model.layers.0.mlp.experts.down_proj", "8 experts in one tensor [8, 64, 32]"),))
    return case, "model.layers.0.mlp.experts.down_proj stays in 16 bits: 8 experts in one tensor [8, 64, 32]"


def good():
    case = measured()
    case.put("checkpoint:", "stacked_experts", ())
    return case
