"""G313 stacked-experts: experts are stored as one three-dimensional tensor, which the plan leaves in 16 bits.

Why: quantizers work on linears, each a matrix of its own. A stack of experts is none, so most programs pass
over it without a word, and a "4-bit" model keeps most of its weights in 16 bits.

Do: unstack the experts with a conversion that the runtime reads (one gate_proj, up_proj and down_proj for
each), or choose a runtime that quantizes the stack while loading.

False alarms: none; the tensors were counted.

Fix safety: no fix: the other layout needs other model code.

Sources: transformers models/llama4/modeling_llama4.py and models/granitemoe/modeling_granitemoe.py (experts
as parameters, not linears); vllm-project/llm-compressor src/llmcompressor/modeling (replaces such modules
before it calibrates).

标题: 专家存成一个三维张量，按计划会留在 16 位

原因: 量化器处理的是线性层，每个是独立的矩阵。叠在一起的专家不是线性层，多数程序一声不响地跳过，“4 位”模型的大
部分权重其实还是 16 位。

处理: 用运行时能读的转换把专家拆开（每个专家各有 gate_proj、up_proj、down_proj），或选加载时能量化整叠专家的运
行时。

误报: 无；这些张量是数出来的。

修复: 不提供修复：换一种布局需要另外的模型代码。
"""

from doctor.rule import Place, finding, rule
from doctor.testing import only_in, tiny

MLP = ("gate", "up", "gate_up", "down")


@rule("G313", "warning")
def stacked_experts(checkpoint, layout, spec, tensors):
    templates = [t for t in spec.templates if len(t.shape) == 3 and t.role in MLP]
    stacks = [
        i
        for i in tensors.values()
        if len(i.shape) == 3 and i.dtype.is_float and any(t.pattern.match(i.name) for t in templates)
    ]
    if layout.quantized or not stacks:
        return
    inside = sum(info.numel for info in stacks)
    share = inside / sum(info.numel for info in tensors.values())
    yield finding(
        f"{len(stacks):,} stacks of experts (first {stacks[0].name}) hold {share:.0%} of the weights and stay in 16 bits",
        at=Place("", tensor=stacks[0].name),
        evidence={"stacks": len(stacks), "values": inside},
        advice="unstack the experts with a conversion that the runtime reads",
    )


def bad():
    return tiny(only_in("granitemoe", "llama4_text", "gpt_oss", why="its experts are not stacked")), (
        "4 stacks of experts (first model.layers.0.block_sparse_moe.input_linear.weight) hold 84% of the weights "
        "and stay in 16 bits"
    )


def good():
    return tiny("qwen2_moe")
