"""G313 stacked-experts: tensors that hold several experts stay in 16 bits.

Why: quantizers work on linears, each a matrix of its own. doctor unfuses a 3-D expert tensor into the linears that
engines read for the family in the recipe's format. Where no engine is known to read them, their sizes do not fit the
recipe, or the family is in no table (DBRX), the tensor stays as it is, and a "4-bit" model keeps most of its weights in
16 bits. An engine computes the linears of an expert in one kernel, so all of them are unfused or none.

Seen as:
- GPTQModel, AutoAWQ: a quantized GPT-OSS or Llama 4 of nearly its old size
- vLLM: random text from GPT-OSS whose experts were saved one by one

Do: choose a format, a group size or a runtime that the finding names as able to read them. vLLM reads Llama 4,
Qwen3.5-MoE and Granite MoE in every format; only GPTQModel reads GPT-OSS, in the GPTQ and AWQ formats.

False alarms: none; the tensors were counted. An engine newer than the table may read more.

Fix safety: no fix: which engine to serve with is the user's choice.

Sources: rules/tables/stacks.toml, with the files of vLLM, GPTQModel and llm-compressor that it was read from.
"""

from doctor.lint.rule import ASKED, Place, _, finding, holds_experts, is_kept, plural, rule
from doctor.lint.testing import only_in, tiny

UNKNOWN = _("no known form of fused experts fits it")
MLP = ("gate", "up", "gate_up", "down")


@rule("G313", "warning")
def stacked_experts(checkpoint, layout, spec, tensors, stacks, recipe):
    if layout.quantized:
        return
    why = {name: found.why for found in stacks for name in found.tensors}
    templates = [t for t in spec.templates if len(t.shape) == 3 and t.role in MLP]
    stays: dict[str, list] = {}
    for info in tensors.values():
        if spec.templates:
            held = len(info.shape) == 3 and info.dtype.is_float and any(t.pattern.match(info.name) for t in templates)
            reason = why.get(info.name, _("its shape is not the family's"))
        else:
            rows_of_all = len(info.shape) == 2 and holds_experts(info, spec.hidden)
            held, reason = rows_of_all and not is_kept(recipe, info.name), UNKNOWN
        if held and reason not in ("", ASKED):
            stays.setdefault(reason, []).append(info)
    whole = sum(info.numel for info in tensors.values())
    for reason, found in stays.items():
        inside = sum(info.numel for info in found)
        yield finding(
            plural(
                "{n:,} fused expert tensor ({first}) holds {share:.0%} of the weights and stays in 16 bits: {reason}",
                "{n:,} fused expert tensors (first {first}) hold {share:.0%} of the weights and stay in 16 bits: {reason}",
                len(found),
                first=found[0].name,
                share=inside / whole,
                reason=reason,
            ),
            at=Place("", tensor=found[0].name),
            evidence={"stacks": len(found), "values": inside},
            advice=_("serve it in 16 bits, or quantize it with a tool that knows the family")
            if reason == UNKNOWN
            else _("choose a format, a group size or a runtime for which the experts can be unfused"),
        )


def bad():
    case = tiny(only_in("granitemoe", "llama4_text", "gpt_oss", why="its experts are not stacked"))
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    return case, (
        "4 fused expert tensors (first model.layers.0.block_sparse_moe.input_linear.weight) hold 84% of the weights "
        "and stay in 16 bits: exllamav2 is not known to read granitemoe experts as gptq linears, vllm can: GPTQModel takes "
        "each stack apart by expert alone, gate and up in one linear, under other names"
    )


def good():
    return tiny("granitemoe")
