"""Q409 bos-doubled: calibration rows start with two BOS tokens.

Why: the chat template writes BOS and the tokenizer adds another. The first tokens have the largest activations of a
model, so the Hessian sees most of a start that never occurs in use.

Do: tokenize rendered templates with add_special_tokens=False.

False alarms: none for rows of text; models that are served with two BOS tokens are rare.

Fix safety: no fix: the rows are yours.

Sources: EleutherAI/lm-evaluation-harness issue 2676 (one BOS more or less decided 0.26 or 0.85);
huggingface/open-r1 issue 462.
"""

from doctor.lint.rule import Place, _, finding, plural, rule
from doctor.lint.testing import change, measured


@rule("Q409", "warning")
def bos_doubled(checkpoint, calibration):
    if not calibration.bos_doubled:
        return
    yield finding(
        plural(
            "{n:,} of {rows:,} calibration rows starts with two BOS tokens",
            "{n:,} of {rows:,} calibration rows start with two BOS tokens",
            calibration.bos_doubled,
            rows=calibration.rows,
        ),
        at=Place(calibration.source),
        evidence={"bos_doubled": calibration.bos_doubled, "rows": calibration.rows},
        advice=_("tokenize rendered templates with add_special_tokens=False"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", bos_doubled=16)
    return case, "16 of 16 calibration rows start with two BOS tokens"


def good():
    return measured()
