"""O604 divergence: the quantized model's predictions differ strongly from its original's.

Why: perplexity can stay while the model changes its mind elsewhere. The divergence (KL, in nats per token)
compares whole distributions and is 0 only for equal ones; 4 bits with groups cost 0.01 to 0.1 in most
models.

Do: more bits, smaller groups, or calibration text nearer to the text of use.

False alarms: very small models, whose 4-bit versions lose more.

Fix safety: no fix: quantize again.

Sources: ggml-org/llama.cpp tools/perplexity (KL divergence); arXiv 2407.09141 (accuracy is not all you
need).
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared

# nats per token, mean. Round-to-nearest at 4 bits in groups gives about 0.1 on small models, at 3 bits about 0.5
KL = 0.3
AGREEMENT = 0.7  # share of tokens with the same first choice


@rule("O604", "warning", implied_by=("O601", "O602", "O606", "O616"))
def divergence(checkpoint, comparison):
    if comparison.kl_mean <= KL and comparison.top1_agreement >= AGREEMENT:
        return
    yield finding(
        f"mean divergence {comparison.kl_mean:.3f} nats a token (99th percentile {comparison.kl_p99:.2f}), the same first choice in "
        f"{comparison.top1_agreement:.1%} of {comparison.tokens:,} tokens (up to {KL} nats and from {AGREEMENT:.0%} passes)",
        evidence={"kl_mean": comparison.kl_mean, "top1_agreement": comparison.top1_agreement},
        advice="take more bits or smaller groups, or calibrate nearer to the text of use",
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", kl_mean=0.71, kl_p99=5.2, top1_agreement=0.62)
    return (
        case,
        "mean divergence 0.710 nats a token (99th percentile 5.20), the same first choice in 62.0% of 8,192 tokens "
        "(up to 0.3 nats and from 70% passes)",
    )


def good():
    return compared()
