"""Q414 builtin-calibration: no calibration text was given, so doctor's own was used.

Why: the built-in text is English documentation. It serves for a first look; a model for other languages,
code or chat is better calibrated on what it will serve.

Do: `--calibration FILE` with text of the kind to be served.

False alarms: none; it says what was used.

Fix safety: no fix: the text is yours to give.

Sources: doctor/quant/calibrate.py.
"""

from doctor.rule import Place, finding, rule
from doctor.testing import change, measured


@rule("Q414", "info")
def builtin_calibration(checkpoint, calibration):
    if calibration.builtin:
        yield finding(
            f"calibrated on {calibration.source}, {calibration.tokens:,} tokens, because no text was given",
            at=Place(calibration.source),
            evidence={"tokens": calibration.tokens},
            advice="--calibration FILE with text of the kind to be served",
        )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", builtin=True, source="Python's documentation")
    return case, "calibrated on Python's documentation, 4,096 tokens, because no text was given"


def good():
    return measured()
