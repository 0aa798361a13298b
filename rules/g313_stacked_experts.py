"""G313 stacked-experts: experts are stored as one three-dimensional tensor, which the plan leaves in 16 bits.

Why: quantizers work on linears, each a matrix of its own. doctor takes a stack apart into the linears that engines read
for the family in the plan's format. Where none is known to, or their sizes do not fit the plan, the stack stays as it
is, and a "4-bit" model keeps most of its weights in 16 bits. An engine computes an expert's linears in one kernel, so
they are taken apart all or not at all.

Seen as:
- GPTQModel, AutoAWQ: a quantized GPT-OSS or Llama 4 of nearly its old size
- vLLM: random text from GPT-OSS whose experts were saved one by one

Do: plan a format, a group size or a runtime that the finding names as able to. Llama 4, Qwen3.5-MoE and Granite MoE are
read by vLLM in every format; GPT-OSS by GPTQModel alone, in the GPTQ and AWQ formats.

False alarms: none; the tensors were counted. An engine newer than the table may read more.

Fix safety: no fix: what to serve with is the user's choice.

Sources: rules/tables/stacks.toml, with the files of vLLM, GPTQModel and llm-compressor that it was read from.
"""

from doctor.lint.rule import ASKED, Place, finding, rule
from doctor.lint.testing import only_in, tiny

MLP = ("gate", "up", "gate_up", "down")


@rule("G313", "warning")
def stacked_experts(checkpoint, layout, spec, tensors, stacks):
    if layout.quantized:
        return
    why = {name: found.why for found in stacks for name in found.tensors}
    templates = [t for t in spec.templates if len(t.shape) == 3 and t.role in MLP]
    stays: dict[str, list] = {}
    for info in tensors.values():
        if len(info.shape) == 3 and info.dtype.is_float and any(t.pattern.match(info.name) for t in templates):
            reason = why.get(info.name, "its shape is not the family's")
            if reason not in ("", ASKED):
                stays.setdefault(reason, []).append(info)
    whole = sum(info.numel for info in tensors.values())
    for reason, found in stays.items():
        inside = sum(info.numel for info in found)
        yield finding(
            f"{len(found):,} stacks of experts (first {found[0].name}) hold {inside / whole:.0%} of the weights and stay in 16 bits: {reason}",
            at=Place("", tensor=found[0].name),
            evidence={"stacks": len(found), "values": inside},
            advice="plan a format, a group size or a runtime for which the experts can be taken apart",
        )


def bad():
    case = tiny(only_in("granitemoe", "llama4_text", "gpt_oss", why="its experts are not stacked"))
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    return case, (
        "4 stacks of experts (first model.layers.0.block_sparse_moe.input_linear.weight) hold 84% of the weights "
        "and stay in 16 bits: exllamav2 is not known to read granitemoe experts as gptq linears, vllm can: GPTQModel takes "
        "each stack apart by expert alone, gate and up in one linear, under other names"
    )


def good():
    return tiny("granitemoe")
