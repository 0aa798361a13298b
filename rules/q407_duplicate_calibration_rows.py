"""Q407 duplicate-calibration-rows: duplicate calibration rows.

Why: a duplicate row adds no direction to the Hessian and doubles the weight of its text; the effective number of tokens
is smaller than it looks.

Do: remove the duplicates, and use fewer rows if the source is small.

False alarms: a few equal rows in a large source, which are not reported up to DUPLICATE_SHARE.

Fix safety: no fix: the text is yours.

Sources: the rows themselves; Q404 judges the number of tokens.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured

DUPLICATE_SHARE = 0.05  # share of rows; below it the Hessian hardly changes


@rule("Q407", "warning")
def duplicate_calibration_rows(checkpoint, calibration):
    if not calibration.duplicate_rows > DUPLICATE_SHARE * calibration.rows:
        return
    yield finding(
        _(
            "{duplicates:,} of {rows:,} calibration rows are duplicates",
            duplicates=calibration.duplicate_rows,
            rows=calibration.rows,
        ),
        at=Place(calibration.source),
        evidence={"duplicate_rows": calibration.duplicate_rows, "rows": calibration.rows},
        advice=_("remove the duplicates"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", duplicate_rows=9)
    return case, "9 of 16 calibration rows are duplicates"


def good():
    return measured()
