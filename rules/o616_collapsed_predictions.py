"""O616 collapsed-predictions: quantized model predicts the same token whatever the text.

Why: a collapsed model still gives finite logits. It ranks one token first at every position (token 0 is "!" in Qwen's
vocabulary), or its probabilities are uniform over the vocabulary. Both show in the predictions on the text, so a model
that is too large to generate replies in memory is judged as well.

Do: see the findings on scales and zero points, and the decoder layer at which the error jumps; then quantize that layer
again.

False alarms: text that repeats one token. An original that does the same is not reported.

Fix safety: no fix: quantize again.

Sources: QwenLM/Qwen issue 381; vllm-project/vllm issue 38966 (token 0 for ever, from finite files).
"""

import math

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

FAVOURITE = 0.5  # of the tokens with the same first choice; a collapsed model is near 1
TWICE = 2.0  # times the original's own share: below, the text is the reason and not the model
FLAT = 0.95  # of ln(vocabulary), the entropy of a uniform guess
SHARPER = 0.8  # of ln(vocabulary): an original above it is no better, as one that was never trained


@rule("O616", "error", implied_by=("O602", "O606"))
def collapsed_predictions(checkpoint, comparison, spec):
    c, evidence = (
        comparison,
        {
            "entropy": comparison.entropy_quantized,
            "entropy_original": comparison.entropy_original,
            "one_choice": comparison.one_choice,
            "one_choice_original": comparison.one_choice_original,
        },
    )
    if c.one_choice > FAVOURITE and c.one_choice > TWICE * c.one_choice_original:
        yield finding(
            _(
                "token {token} is the top prediction at {share:.0%} of {tokens:,} tokens (the original's most frequent one at "
                "{original:.0%}; above {limit:.0%} is a collapse)",
                token=c.one_choice_token,
                share=c.one_choice,
                tokens=c.tokens,
                original=c.one_choice_original,
                limit=FAVOURITE,
            ),
            evidence=evidence,
            advice=_("look at scales, zero points and the layer at which the error jumps"),
        )
        return
    guess = math.log(spec.vocab) if spec.vocab and spec.vocab > 1 else math.inf
    if c.entropy_quantized > FLAT * guess and c.entropy_original < SHARPER * guess:
        yield finding(
            _(
                "next-token entropy is {entropy:.2f} nats, {share:.0%} of a uniform guess (the original's {original:.2f}; above "
                "{limit:.0%} is a collapse)",
                entropy=c.entropy_quantized,
                share=c.entropy_quantized / guess,
                original=c.entropy_original,
                limit=FLAT,
            ),
            evidence=evidence,
            advice=_("look at scales, zero points and the layer at which the error jumps"),
        )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", one_choice=0.97, one_choice_token=0)
    return (
        case,
        "token 0 is the top prediction at 97% of 8,192 tokens (the original's most frequent one at 5%; above 50% is a collapse)",
    )


def good():
    case = compared()
    change(case, "checkpoint:", "comparison", one_choice=0.6, one_choice_original=0.55)  # the text is like that
    return case
