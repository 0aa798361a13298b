"""Q416 stacked-experts-kept: experts that lie in one 3-D tensor were left in 16 bits.

Why: most of a mixture's weights are its experts. Where a checkpoint stores them as one tensor [experts, out, in], they
are taken apart into the linears that engines read. Where no engine is known to read such linears of the family in the
output's format, or their sizes do not fit the plan, or the family is not in the table, they stay, and the output is
nearly as large as the input although its config says 4 bits. That is so for GPT-OSS in compressed-tensors (vLLM passes
over linears of single experts without a word), and for families whose stacks the table does not have: DBRX, JetMoE,
Aria.

Seen as:
- GPTQModel: a quantized GPT-OSS or Llama 4 of nearly its old size
- AutoAWQ: experts that no line of the log mentions

Do: plan another format, group size or runtime, as the finding says (rule G313 tells it before the run), or serve what
is there: engines are told that these modules are in 16 bits.

False alarms: none; it reports what was done. What was asked for with --ignore is not reported.

Fix safety: no fix: the layout of a checkpoint is its publisher's choice.

Sources: rules/tables/stacks.toml; huggingface/transformers src/transformers/models/gpt_oss/modeling_gpt_oss.py
(GptOssExperts); src/transformers/models/llama4/modeling_llama4.py (Llama4TextExperts).
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import measured


@rule("Q416", "warning")
def stacked_experts_kept(checkpoint, stacked_experts):
    for name, why in stacked_experts:
        yield finding(
            f"{name} stays in 16 bits: {why}",
            advice="plan a format, a group size or a runtime for which they can be taken apart",
        )


def bad():
    case = measured()
    case.put(
        "checkpoint:",
        "stacked_experts",
        (("model.layers.0.mlp.experts.down_proj", "8 experts in one tensor [8, 64, 32]"),),
    )
    return case, "model.layers.0.mlp.experts.down_proj stays in 16 bits: 8 experts in one tensor [8, 64, 32]"


def good():
    case = measured()
    case.put("checkpoint:", "stacked_experts", ())
    return case
