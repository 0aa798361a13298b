"""G335 layers-not-run-in-turn: decoder layers of this family cannot be calibrated one by one.

Why: GPTQ, AWQ and other calibrated methods run one decoder layer after another, each with weights of its own. Zamba's
layers share one attention; XLM keeps attentions and feed-forwards in separate lists; HRM runs its layers in cycles; and
the loader of transformers makes the parameters of Molmo2, Ernie 4.5 VL, Inkling and Step 3.7 of tensors with other names
and shapes. This is known from the family's name, so it is said before any work. A method without calibration runs no model
and can take them.

Seen as:
- GPTQModel: `is not supported yet`
- AutoAWQ: `isn't supported yet`

Do: choose a scheme without calibration, as --scheme FP8_DYNAMIC, for the runtime that the finding names.

False alarms: none known: quantize itself ends there.

Fix safety: manual: which method and runtime to take is the user's choice.

Sources: transformers 5.24 src/transformers/models/{zamba,xlm,hrm_text,molmo2,ernie4_5_vl_moe,inkling,step3p7}/modeling_*.py and
src/transformers/conversion_mapping.py; vLLM 0.32 vllm/model_executor/models/registry.py; measured by tests/coverage.py.
"""

from doctor.lint.rule import Place, _, finding, rule, streams
from doctor.lint.testing import tiny


@rule("G335", "error", implied_by=("C147", "G330"))
def layers_not_run_in_turn(checkpoint, config, recipe, goal, unfollowed):
    family = str(config.get("model_type", ""))
    known = unfollowed.get(family)
    if known is None or goal != "quantize" or streams(recipe):
        return
    reasons = {
        "shared": _("several of its decoder layers share one linear"),
        "made": _("transformers makes parameters of its decoder layers of other tensors than the files hold"),
        "cycles": _("it runs its decoder layers several times, in cycles"),
        "lists": _("the linears of a decoder layer are in several lists of the model"),
    }
    yield finding(
        _(
            "{family}: {why}; {method} needs to run decoder layers one after another",
            family=family,
            why=reasons[known["why"]],
            method=recipe.label(),
        ),
        at=Place("config.json", pointer="/model_type"),
        evidence={"family": family, "why": known["why"]},
        advice=_("choose a scheme without calibration: --scheme FP8_DYNAMIC")
        if "transformers" in known["readers"]
        else _(
            "choose a scheme without calibration: --scheme FP8_DYNAMIC --runtime {runtime}; transformers does not load "
            "the copy",
            runtime=known["readers"][0],
        ),
    )


def bad():
    case = tiny()
    case.config["model_type"], case.config["architectures"] = "zamba", ["ZambaForCausalLM"]
    case.recipe = case.recipe.with_field("goal", "quantize")
    return case, (
        "zamba: several of its decoder layers share one linear; gptq 4-bit g32 needs to run decoder layers one after another"
    )


def good():
    return tiny()
