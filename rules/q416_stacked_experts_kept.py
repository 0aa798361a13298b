"""Q416 stacked-experts-kept: fused 3-D expert tensors were left in 16 bits.

Why: most weights of a mixture-of-experts model are in its experts. Where a checkpoint stores them as one tensor
[experts, out, in], doctor unfuses them into the linears that engines read. Where no engine is known to read such
linears of the family in the output format, or their sizes do not fit the recipe, or the family is not in the table,
they stay, and the output is nearly as large as the input although its config says 4 bits. This holds for GPT-OSS in
compressed-tensors (vLLM silently skips linears of single experts), and for families whose fused tensors are not in the
table: DBRX, JetMoE, Aria.

Seen as:
- GPTQModel: a quantized GPT-OSS or Llama 4 of nearly its old size
- AutoAWQ: experts that no line of the log mentions

Do: choose another format, group size or runtime, as the finding says (rule G313 reports it before the run), or serve
the output as it is: its config tells engines that these modules are in 16 bits.

False alarms: none; it reports what was done. Tensors that --ignore names are not reported.

Fix safety: no fix: the publisher decides how a checkpoint stores its experts.

Sources: rules/tables/stacks.toml; huggingface/transformers src/transformers/models/gpt_oss/modeling_gpt_oss.py
(GptOssExperts); src/transformers/models/llama4/modeling_llama4.py (Llama4TextExperts).
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import measured


@rule("Q416", "warning")
def stacked_experts_kept(checkpoint, stacked_experts):
    alike: dict[str, list[str]] = {}
    for name, why in stacked_experts:
        alike.setdefault(why, []).append(name)
    for why, names in alike.items():
        yield finding(
            plural(
                "{n:,} tensor of experts stays in 16 bits, {first}: {reason}",
                "{n:,} tensors of experts stay in 16 bits, first {first}: {reason}",
                len(names),
                first=names[0],
                reason=why,
            ),
            evidence={"tensors": names[:100]},
            advice=_("choose a format, a group size or a runtime for which the experts can be unfused"),
        )


def bad():
    case = measured()
    why = "8 experts in one tensor [8, 64, 32]"
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    case.put("checkpoint:", "stacked_experts", tuple((name, why) for name in names))
    return case, f"2 tensors of experts stay in 16 bits, first {names[0]}: {why}"


def good():
    case = measured()
    case.put("checkpoint:", "stacked_experts", ())
    return case
