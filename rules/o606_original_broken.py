"""O606 original-broken: the model was broken before it was quantized.

Why: the original itself puts out NaN or Inf on the same text, or predicts worse than chance. Nothing can be
learned about the quantization then, and no recipe will help.

Seen as:
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`

Do: `doctor check` on the original.

False alarms: none for values that are not finite.

Fix safety: no fix: the original needs one.

Sources: turboderp/exllamav2 issue 600 (models that overflow in their own reference pass).
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared


@rule("O606", "error")
def original_broken(checkpoint, comparison, spec):
    before = comparison.perplexity_original
    if comparison.nonfinite_original:
        yield finding(
            f"{comparison.nonfinite_original:,} of {comparison.tokens:,} rows of the original's logits hold NaN or Inf",
            evidence={"nonfinite": comparison.nonfinite_original},
            advice="run doctor check on the original",
        )
    elif spec.vocab and not before <= spec.vocab:
        yield finding(
            f"the original's perplexity is {before:,.0f}, worse than guessing among {spec.vocab:,} tokens",
            evidence={"perplexity": before, "vocab": spec.vocab},
            advice="run doctor check on the original",
        )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", nonfinite_original=8192, nonfinite_quantized=8192)
    return case, "8,192 of 8,192 rows of the original's logits hold NaN or Inf"


def good():
    return compared()
