"""Q410 expert-underseen: expert received too few calibration tokens from the router.

Why: each expert has its own Hessian. With fewer tokens than a quarter of its in_features, that Hessian is mostly
damping. With no token there is no Hessian, and programs crash, round silently or divide by zero.

Seen as:
- GPTQModel: `'GPTQ' object has no attribute 'H'`
- ExLlamaV2: `has less than 10% calibration for`
- AutoAWQ: `increase max_calib_samples`
- GPTQModel: `is not activated due to model inference logic (MoE)`
- GPTQModel: `AWQProcessor error: missing activation features for modules`
- llm-compressor: `NaN input_global_scale`

Do: calibrate on more and more varied text; four times the tokens roughly halve the number of starved experts.

False alarms: an expert that no text ever reaches loses nothing; it is reported all the same.

Fix safety: no fix: doctor rounds an expert without tokens to nearest.

Sources: ModelCloud/GPTQModel issues 1376 and 1680; casper-hansen/AutoAWQ commit de21987;
vllm-project/llm-compressor PR 2826.
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import change, measured, only_in

TOKEN_SHARE = 0.25  # tokens per in_feature; below it more than three quarters of the directions are unseen


@rule("Q410", "warning", implied_by=("Q401",))
def expert_underseen(linear, hessian):
    if linear.expert is None or hessian.tokens >= TOKEN_SHARE * hessian.in_features:
        return
    if hessian.tokens:
        message = plural(
            "{linear} (expert {expert}) saw {n:,} calibration token for {in_features:,} in_features",
            "{linear} (expert {expert}) saw {n:,} calibration tokens for {in_features:,} in_features",
            hessian.tokens,
            linear=linear.name,
            expert=linear.expert,
            in_features=hessian.in_features,
        )
    else:
        message = _(
            "{linear} (expert {expert}): 0 tokens reached it, so it is rounded without a Hessian",
            linear=linear.name,
            expert=linear.expert,
        )
    yield finding(
        message,
        evidence={"tokens": hessian.tokens, "in_features": hessian.in_features, "expert": linear.expert},
        advice=_("calibrate on more and more varied text"),
    )


def bad():
    case = measured(only_in("qwen2_moe", "qwen3_moe", "olmoe", why="it has no experts"))
    name = next(s for s, _fact in case.facts if ".experts.3.down_proj" in s)
    change(case, name, "hessian", tokens=9)
    return case, f"{name.removeprefix('linear:')} (expert 3) saw 9 calibration tokens for 64 in_features"


def good():
    return measured(only_in("qwen2_moe", "qwen3_moe", "olmoe", why="it has no experts"))
