"""Q413 narrow-calibration: calibration text uses too few distinct tokens.

Why: text of one kind fits the quantized model to that kind: in one report perplexity was 7.6 on the calibration text
and far worse on all other text.

Do: mix sources: prose, code, chat, and every language that the model will serve.

False alarms: a model for one narrow task, calibrated on that task.

Fix safety: no fix: the text is yours.

Sources: turboderp/exllamav2 issue 262; Heaps' law: distinct words grow about as the square root of the
text, by a factor of 10 to 100.
"""

import math

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured

# Distinct tokens per square root of the tokens. Ordinary text has 10 or more; repeated templates have 2 or fewer.
DIVERSITY = 3
VOCABULARY_SHARE = 0.25  # a small vocabulary is used up before the text is large


@rule("Q413", "warning", certainty="likely", implied_by=("Q407",))
def narrow_calibration(checkpoint, calibration, spec):
    floor = DIVERSITY * math.sqrt(calibration.tokens)
    if spec.vocab:
        floor = min(floor, VOCABULARY_SHARE * spec.vocab)
    if calibration.distinct_tokens >= floor:
        return
    yield finding(
        _(
            "{tokens:,} calibration tokens, of which only {distinct:,} are distinct",
            tokens=calibration.tokens,
            distinct=calibration.distinct_tokens,
        ),
        at=Place(calibration.source),
        evidence={"tokens": calibration.tokens, "distinct": calibration.distinct_tokens},
        advice=_("mix sources: prose, code, chat and every language to be served"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", distinct_tokens=11)
    return case, "4,096 calibration tokens, of which only 11 are distinct"


def good():
    return measured()
