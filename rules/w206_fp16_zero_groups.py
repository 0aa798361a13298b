"""W206 fp16-zero-groups: groups of weights underflow to zero in float16.

Why: the smallest float16 is 6e-8; smaller bfloat16 weights round to 0. Where a whole group is that small, a loader that
casts to float16 gets a group of zeros and divides by it. The files hold no NaN, yet the output is NaN.

Seen as:
- AutoAWQ: `assert torch.isnan(w).sum() == 0`
- AutoAWQ: `assert torch.isnan(scales).sum() == 0`

Do: quantize from bfloat16 without a cast (doctor does), or with AutoAWQ 0.2.6 or newer.

False alarms: none where the quantizer casts to float16; harmless where it does not.

Fix safety: no fix is needed in the files: the weights are correct.

Sources: casper-hansen/AutoAWQ PR 519; InternLM/lmdeploy issue 1786 (Qwen2-72B gate and up projections).
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import encode, tiny

SMALLEST = 2.98e-8  # float32 values below half of float16's smallest subnormal, 5.96e-8, round to 0


@rule("W206", "warning", certainty="likely")
def fp16_zero_groups(linear, zero_groups, zero_groups_fp16, recipe, goal):
    if goal != "quantize":
        return
    lost = zero_groups_fp16 - zero_groups
    if lost <= 0:
        return
    size = linear.in_features if recipe.group_size == -1 else recipe.group_size
    yield finding(
        plural(
            "{n:,} group of {size} weights in {tensor} is below {limit:.2e} and would be all 0 in float16",
            "{n:,} groups of {size} weights in {tensor} are below {limit:.2e} and would be all 0 in float16",
            lost,
            size=size,
            tensor=linear.tensor,
            limit=SMALLEST,
        ),
        evidence={"zero_groups": zero_groups, "zero_groups_fp16": zero_groups_fp16},
        advice=_("quantize from bfloat16 without a cast to float16"),
    )


def bad():
    case = tiny()
    case.down()[5, 32:64] = encode([1e-9], "BF16")[0]
    return (
        case,
        f"1 group of 32 weights in {case.name('down')} is below 2.98e-08 and would be all 0 in float16",
    )


def good():
    case = tiny()
    case.down()[5, 32:63] = encode([1e-9], "BF16")[0]
    return case
