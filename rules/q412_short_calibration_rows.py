"""Q412 short-calibration-rows: calibration rows are too short to show the model at work.

Why: in short rows most tokens are near the start, where attention has little to look at; the Hessian then
describes beginnings. And few long rows hold more tokens than many short ones.

Seen as:
- GPTQModel: `calibration dataset size should be more than`
- GPTQModel: `were removed. Use quantize(calibration_data_min_length=`

Do: join texts and cut rows of 512 to 2,048 tokens.

False alarms: a model made for short texts.

Fix safety: no fix: the rows are yours.

Sources: Frantar et al. 2022 (arXiv 2210.17323) §5; ModelCloud/GPTQModel issue 1497 (concat_size).
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import change, measured

SHORT = 64  # tokens, median row. GPTQ's authors took 2,048, AutoAWQ takes 512; a sentence has about 25


@rule("Q412", "warning", certainty="likely")
def short_calibration_rows(checkpoint, calibration):
    if calibration.median >= SHORT:
        return
    yield finding(
        f"half of the {calibration.rows:,} calibration rows have {calibration.median:,} tokens or fewer",
        at=Place(calibration.source),
        evidence={"median": calibration.median, "shortest": calibration.shortest},
        advice="join texts and cut rows of 512 tokens or more",
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", median=31, shortest=4)
    return case, "half of the 16 calibration rows have 31 tokens or fewer"


def good():
    return measured()
