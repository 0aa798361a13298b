"""O606 original-broken: original model is broken before quantization.

Why: the original itself generates NaN or Inf on the same text, or predicts worse than chance. The comparison then says
nothing about the quantization, and no recipe helps.

Seen as:
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`

Do: run `doctor check` on the original.

False alarms: none for values that are not finite.

Fix safety: no fix: the original needs one.

Sources: turboderp/exllamav2 issue 600 (models that overflow in their own reference pass).
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared


@rule("O606", "error")
def original_broken(checkpoint, comparison, spec):
    before = comparison.perplexity_original
    if comparison.nonfinite_original:
        yield finding(
            _(
                "{nonfinite:,} of {tokens:,} rows of the original's logits hold NaN or Inf",
                nonfinite=comparison.nonfinite_original,
                tokens=comparison.tokens,
            ),
            evidence={"nonfinite": comparison.nonfinite_original},
            advice=_("run doctor check on the original"),
        )
    elif spec.vocab and not before <= spec.vocab:
        yield finding(
            _(
                "the original's perplexity is {perplexity:,.0f}, worse than guessing among {vocab:,} tokens",
                perplexity=before,
                vocab=spec.vocab,
            ),
            evidence={"perplexity": before, "vocab": spec.vocab},
            advice=_("run doctor check on the original"),
        )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", nonfinite_original=8192, nonfinite_quantized=8192)
    return case, "8,192 of 8,192 rows of the original's logits hold NaN or Inf"


def good():
    return compared()
