"""G311 act-order-under-tp: desc_act checkpoint served with tensor parallelism.

Why: with desc_act the columns of a group are scattered over the row, so a GPU that holds a part of o or down needs the
scales of all groups. Runtimes then use a slower path for these linears, and some versions computed wrong outputs.

Do: serve on one GPU, or quantize again with static groups (doctor's act_order always uses them: the columns of a group
stay together).

False alarms: a runtime whose kernel keeps all scales on each GPU (Marlin with full-k) is correct, only slower.

Fix safety: no fix: the order is part of the stored codes.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/gptq.py (create_weights), issue 7374.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gptq


@rule("G311", "warning", certainty="likely")
def act_order_under_tp(checkpoint, layout, quantization, recipe):
    if not (layout.act_order and recipe.tp > 1):
        return
    yield finding(
        _(
            "desc_act is true with group size {group}: {tp} GPUs cannot each hold whole groups",
            group=layout.group_size,
            tp=recipe.tp,
        ),
        at=Place(quantization.file, pointer=f"{quantization.pointer}/desc_act"),
        evidence={"tp": recipe.tp, "group_size": layout.group_size},
        advice=_("serve on one GPU, or quantize again with static groups"),
    )


def bad():
    case = tiny_gptq()
    case.config["quantization_config"]["desc_act"] = True
    case.recipe = case.recipe.with_field("tp", 2).with_field("runtime", "transformers")
    return case, "desc_act is true with group size 32: 2 GPUs cannot each hold whole groups"


def good():
    return tiny_gptq()
