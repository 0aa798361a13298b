"""Q404 too-few-calibration-rows: fewer calibration tokens than in_features.

Why: H then has at most as many independent directions as tokens. Only damping determines the rest, and corrections
follow noise. Tokens count, not samples: 128 samples of 50 tokens are 6,400, fewer than the 24,576 inputs of a 72B
model's down.

Seen as:
- AutoGPTQ: `leading minor of order 1025 is not positive-definite`
- ExLlamaV2: `ValueError: Hessian is not invertible`

Do: use more rows or longer rows, several times the in_features of the widest linear.

False alarms: plain rounding (rtn) needs no calibration, and experts of a mixture have their own rule (Q410).

Fix safety: no fix: you provide the text.

Sources: Frantar et al. 2022 (arXiv 2210.17323) §5 (128 rows of 2,048 tokens); AutoGPTQ/AutoGPTQ issue 708;
vllm-project/llm-compressor issue 142.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, measured


@rule("Q404", "warning", implied_by=("Q401",))
def too_few_calibration_rows(linear, hessian):
    if linear.expert is not None or not 0 < hessian.tokens < hessian.in_features:  # 0: Q406 says that none reached it
        return
    yield finding(
        _(
            "{linear} saw {tokens:,} calibration tokens for {in_features:,} in_features",
            linear=linear.name,
            tokens=hessian.tokens,
            in_features=hessian.in_features,
        ),
        evidence={"tokens": hessian.tokens, "in_features": hessian.in_features},
        advice=_("use {n:,} tokens or more: more or longer rows", n=4 * hessian.in_features),
    )


def bad():
    case = measured()
    name = case.name("o").removesuffix(".weight")
    change(case, f"linear:{name}", "hessian", tokens=20)
    return case, f"{name} saw 20 calibration tokens for 64 in_features"


def good():
    return measured()
