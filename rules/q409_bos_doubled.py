"""Q409 bos-doubled: calibration rows begin with two BOS tokens.

Why: the chat template writes BOS and the tokenizer adds another. The first tokens carry the largest
activations of a model, so a start that never occurs in use is what the Hessian sees most of.

Do: tokenize rendered templates with add_special_tokens=False.

False alarms: none for rows of text; a model that is served with two is rare.

Fix safety: no fix: the rows are yours.

Sources: EleutherAI/lm-evaluation-harness issue 2676 (one BOS more or less decided 0.26 or 0.85);
huggingface/open-r1 issue 462.
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import change, measured


@rule("Q409", "warning")
def bos_doubled(checkpoint, calibration):
    if not calibration.bos_doubled:
        return
    yield finding(
        f"{calibration.bos_doubled:,} of {calibration.rows:,} calibration rows begin with two BOS tokens",
        at=Place(calibration.source),
        evidence={"bos_doubled": calibration.bos_doubled, "rows": calibration.rows},
        advice="tokenize rendered templates with add_special_tokens=False",
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", bos_doubled=16)
    return case, "16 of 16 calibration rows begin with two BOS tokens"


def good():
    return measured()
