"""Q408 padding-in-calibration: calibration rows hold padding tokens.

Why: a program that ignores the attention mask counts padding as text: the Hessian then learns the one
vector that padding makes, and its share is taken from real text.

Do: pack the texts end to end and cut rows of one length (doctor does), or calibrate one row at a time
without padding.

False alarms: a pad token that the model also uses as an end of text is not counted.

Fix safety: no fix: the rows are yours.

Sources: AutoGPTQ/AutoGPTQ issue 306 (batch_size 1 cured it); intel/auto-round issue 1167.
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import change, measured


@rule("Q408", "warning")
def padding_in_calibration(checkpoint, calibration):
    if not calibration.padding:
        return
    share = calibration.padding / calibration.tokens
    yield finding(
        f"{calibration.padding:,} of {calibration.tokens:,} calibration tokens ({share:.1%}) are padding",
        at=Place(calibration.source),
        evidence={"padding": calibration.padding, "tokens": calibration.tokens},
        advice="pack the texts end to end instead of padding them",
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", padding=512)
    return case, "512 of 4,096 calibration tokens (12.5%) are padding"


def good():
    return measured()
