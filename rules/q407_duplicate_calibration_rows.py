"""Q407 duplicate-calibration-rows: calibration rows stand there more than once.

Why: a row twice adds no direction to the Hessian and gives its text double weight; the real number of
tokens is smaller than it looks.

Do: remove the copies, and ask for fewer rows if the source is small.

False alarms: a few equal rows in a large source, which stay silent up to DUPLICATE_SHARE.

Fix safety: no fix: the text is yours.

Sources: the rows themselves; the tokens' count is what Q404 judges.
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import change, measured

DUPLICATE_SHARE = 0.05  # share of rows; below it the Hessian hardly changes


@rule("Q407", "warning")
def duplicate_calibration_rows(checkpoint, calibration):
    if not calibration.duplicate_rows > DUPLICATE_SHARE * calibration.rows:
        return
    yield finding(
        f"{calibration.duplicate_rows:,} of {calibration.rows:,} calibration rows are copies",
        at=Place(calibration.source),
        evidence={"duplicate_rows": calibration.duplicate_rows, "rows": calibration.rows},
        advice="remove the copies",
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", duplicate_rows=9)
    return case, "9 of 16 calibration rows are copies"


def good():
    return measured()
