"""O616 collapsed-predictions: the quantized model predicts nearly the same whatever the text.

Why: a model that has collapsed still gives finite logits. It ranks one token first wherever it stands (token 0 is "!"
in Qwen's vocabulary), or it spreads its belief evenly over the whole vocabulary. Both show in the predictions on the
text, so a model too large to be held in memory and asked for replies is judged as well.

Do: see the findings on scales and zero points, and the block at which the error jumps; then quantize that block again.

False alarms: text that is one token over and over. An original that does the same is no collapse and is not reported.

Fix safety: no fix: quantize again.

Sources: QwenLM/Qwen issue 381; vllm-project/vllm issue 38966 (token 0 for ever, from finite files).
"""

import math

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared

FAVOURITE = 0.5  # of the tokens with the same first choice; a collapsed model is near 1
TWICE = 2.0  # times the original's own share: below, the text is the reason and not the model
FLAT = 0.95  # of ln(vocabulary), the entropy of a blind guess
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
            f"token {c.one_choice_token} is the first choice at {c.one_choice:.0%} of {c.tokens:,} tokens (the original's favourite at "
            f"{c.one_choice_original:.0%}; above {FAVOURITE:.0%} is a collapse)",
            evidence=evidence,
            advice="look at scales, zero points and the block at which the error jumps",
        )
        return
    guess = math.log(spec.vocab) if spec.vocab and spec.vocab > 1 else math.inf
    if c.entropy_quantized > FLAT * guess and c.entropy_original < SHARPER * guess:
        yield finding(
            f"next-token entropy is {c.entropy_quantized:.2f} nats, {c.entropy_quantized / guess:.0%} of a blind guess (the original's "
            f"{c.entropy_original:.2f}; above {FLAT:.0%} is a collapse)",
            evidence=evidence,
            advice="look at scales, zero points and the block at which the error jumps",
        )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", one_choice=0.97, one_choice_token=0)
    return (
        case,
        "token 0 is the first choice at 97% of 8,192 tokens (the original's favourite at 5%; above 50% is a collapse)",
    )


def good():
    case = compared()
    change(case, "checkpoint:", "comparison", one_choice=0.6, one_choice_original=0.55)  # the text is like that
    return case
