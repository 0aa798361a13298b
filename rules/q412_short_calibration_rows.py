"""Q412 short-calibration-rows: calibration rows are too short.

Why: in short rows most tokens are near the start, where attention has little context; the Hessian then describes
beginnings. A few long rows also hold more tokens than many short ones.

Seen as:
- GPTQModel: `calibration dataset size should be more than`
- GPTQModel: `were removed. Use quantize(calibration_data_min_length=`

Do: concatenate texts and cut rows of 512 to 2,048 tokens.

False alarms: a model made for short texts.

Fix safety: no fix: the rows are yours.

Sources: Frantar et al. 2022 (arXiv 2210.17323) §5; ModelCloud/GPTQModel issue 1497 (concat_size).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured

SHORT = 64  # tokens, median row. GPTQ's authors used 2,048, AutoAWQ uses 512; a sentence has about 25


@rule("Q412", "warning", certainty="likely")
def short_calibration_rows(checkpoint, calibration):
    if calibration.median >= SHORT:
        return
    yield finding(
        _(
            "half of the {rows:,} calibration rows have {median:,} tokens or fewer",
            rows=calibration.rows,
            median=calibration.median,
        ),
        at=Place(calibration.source),
        evidence={"median": calibration.median, "shortest": calibration.shortest},
        advice=_("concatenate texts and cut rows of 512 tokens or more"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", median=31, shortest=4)
    return case, "half of the 16 calibration rows have 31 tokens or fewer"


def good():
    return measured()
