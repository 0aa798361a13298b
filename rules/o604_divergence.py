"""O604 divergence: high KL divergence between the quantized model and the original.

Why: perplexity can stay the same while predictions change elsewhere. The KL divergence (nats per token) compares whole
distributions and is 0 only for equal ones; 4 bits with groups cost 0.01 to 0.1 in most models.

Do: use more bits, smaller groups, or calibration text closer to the text in use.

False alarms: very small models, whose 4-bit versions lose more.

Fix safety: no fix: quantize again.

Sources: ggml-org/llama.cpp tools/perplexity (KL divergence); arXiv 2407.09141 (accuracy is not all you
need).
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

# nats per token, mean. Round-to-nearest at 4 bits in groups gives about 0.1 on small models, at 3 bits about 0.5
KL = 0.3
AGREEMENT = 0.7  # share of tokens with the same top token


@rule("O604", "warning", implied_by=("O601", "O602", "O606", "O616"))
def divergence(checkpoint, comparison):
    if comparison.kl_mean <= KL and comparison.top1_agreement >= AGREEMENT:
        return
    yield finding(
        _(
            "mean KL divergence {mean:.3f} nats per token (99th percentile {p99:.2f}), the same top token at {agreement:.1%} of "
            "{tokens:,} tokens (up to {most} nats and from {least:.0%} passes)",
            mean=comparison.kl_mean,
            p99=comparison.kl_p99,
            agreement=comparison.top1_agreement,
            tokens=comparison.tokens,
            most=KL,
            least=AGREEMENT,
        ),
        evidence={"kl_mean": comparison.kl_mean, "top1_agreement": comparison.top1_agreement},
        advice=_("use more bits or smaller groups, or calibrate on text closer to the text in use"),
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", kl_mean=0.71, kl_p99=5.2, top1_agreement=0.62)
    return (
        case,
        "mean KL divergence 0.710 nats per token (99th percentile 5.20), the same top token at 62.0% of 8,192 tokens "
        "(up to 0.3 nats and from 70% passes)",
    )


def good():
    return compared()
