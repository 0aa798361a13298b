"""W214 outlier-norm-weight: one weight of a norm is a hundred times the rest.

Why: the linears that read this norm get one input so much larger than the others. Where a runtime rounds inputs to
8-bit integers, that input sets the scale of each token and the others keep one or two codes. Where inputs stay in 16
bits, the rounding errors of one column of the weights count a hundred times as much as those of the others: rounding
without calibration does not know that.

Do: for 8-bit inputs, calibrate (SmoothQuant moves the factor into the weights) or take a scheme with 16-bit or FP8
inputs. Else quantize with calibration rows (gptq, awq).

False alarms: a model may have learnt a large weight for an input that is always small. Norms whose output is added to
the residual stream are not judged: Gemma 3 270M has such weights 172 times the median. The largest before a linear is
14 times the median in SmolLM2-135M and 41 times in Gemma 3 270M.

Fix safety: no fix: the weight was trained so.

Sources: arXiv 2211.10438 section 3 (outliers of activations and their scale); doctor/scan/outliers.py.
"""

from doctor.lint.rule import KNOWN, Place, _, finding, rule
from doctor.lint.testing import never_in, np, tiny

TIMES = 80  # of the median weight; trained norms before a linear stay below 42


@rule("W214", "info", certainty="hint", implied_by=("W201", "W207"))
def outlier_norm_weight(tensor, outlier_entry, tensors, recipe, goal):
    if outlier_entry is None or not outlier_entry.times >= TIMES or goal != "quantize" or not _feeds(tensor, tensors):
        return
    rounded = KNOWN[recipe.output_format].smooths
    values = {"entry": outlier_entry.place, "tensor": tensor.name, "times": outlier_entry.times}
    yield finding(
        _(
            "weight {entry:,} of {tensor} is {times:,.0f} times the median: 8-bit inputs leave the others {left:.1f} of 255 codes",
            left=255 / outlier_entry.times,
            **values,
        )
        if rounded
        else _(
            "weight {entry:,} of {tensor} is {times:,.0f} times the median: rounding errors in that column of the linears behind it count as much more",
            **values,
        ),
        severity="warning" if rounded else "info",
        at=Place("", tensor=tensor.name, index=(outlier_entry.place,)),
        evidence={"entry": outlier_entry.place, "times": outlier_entry.times},
        advice=_("quantize with calibration rows (gptq, awq), which weigh a column by its inputs"),
    )


def _feeds(tensor, tensors):
    """Whether linears read this norm: names as Llama's and Gemma's kin have them. Their post_attention_layernorm comes
    before the MLP unless the MLP has a norm of its own before or behind it.
    """
    layer, _dot, name = tensor.name.removesuffix(".weight").rpartition(".")
    if name == "post_attention_layernorm":
        return not any(f"{layer}.{own}_feedforward_layernorm.weight" in tensors for own in ("pre", "post"))
    return name in ("input_layernorm", "pre_feedforward_layernorm")


def bad():
    case = tiny(never_in("gemma", "opt", why="its norm weights are added to 1, or are named otherwise"))
    name = "model.layers.1.input_layernorm.weight"
    weights = np.full(64, 0x3F80, np.uint16)  # 1.0
    weights[9] = 0x4300  # 128.0
    case.tensors[name] = weights
    return case, (
        f"weight 9 of {name} is 128 times the median: rounding errors in that column of the linears behind it count as "
        "much more"
    )


def good():
    case = tiny("llama")
    name = "model.layers.1.post_attention_layernorm.weight"
    case.tensors[name] = np.full(64, 0x3F80, np.uint16)
    case.tensors[name][9] = 0x4280  # 64.0
    return case
