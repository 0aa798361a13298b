"""Q408 padding-in-calibration: padding tokens in the calibration rows.

Why: a program that ignores the attention mask counts padding as text: the Hessian then learns the one vector that
padding produces instead of real text.

Do: concatenate the texts and cut rows of one length (doctor does), or calibrate one row at a time without padding.

False alarms: a pad token that the model also uses as end of text is not counted.

Fix safety: no fix: the rows are yours.

Sources: AutoGPTQ/AutoGPTQ issue 306 (batch_size 1 fixed it); intel/auto-round issue 1167.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured


@rule("Q408", "warning")
def padding_in_calibration(checkpoint, calibration):
    if not calibration.padding:
        return
    yield finding(
        _(
            "{padding:,} of {tokens:,} calibration tokens ({share:.1%}) are padding",
            padding=calibration.padding,
            tokens=calibration.tokens,
            share=calibration.padding / calibration.tokens,
        ),
        at=Place(calibration.source),
        evidence={"padding": calibration.padding, "tokens": calibration.tokens},
        advice=_("concatenate the texts instead of padding them"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", padding=512)
    return case, "512 of 4,096 calibration tokens (12.5%) are padding"


def good():
    return measured()
