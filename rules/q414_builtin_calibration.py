"""Q414 builtin-calibration: no calibration text was given: doctor used its built-in text.

Why: the built-in text is Python's English documentation and, for up to a quarter of the rows, text that the model
itself generates at temperature 1; the evidence counts those rows. Where the whole model does not fit in memory or would
take long to sample from, it is documentation only, and the evidence gives the reason. Either is enough for a first
look; calibrate a model for other languages, code or chat on the text that it will serve.

Do: use `--calibration FILE` with text of the kind to be served.

False alarms: none; it reports what was used.

Fix safety: no fix: you provide the text.

Sources: doctor/quant/calibration/rows.py, doctor/quant/calibration/self_generated.py; arXiv 2410.17170
(self-calibration).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, measured


@rule("Q414", "info")
def builtin_calibration(checkpoint, calibration):
    if calibration.builtin:
        yield finding(
            _(
                "calibrated on {source}, {tokens:,} tokens, because no text was given",
                source=calibration.source,
                tokens=calibration.tokens,
            ),
            at=Place(calibration.source),
            evidence={
                "tokens": calibration.tokens,
                "sampled_rows": calibration.sampled_rows,
                **({"not_sampled": calibration.not_sampled} if calibration.not_sampled else {}),
            },
            advice=_("use --calibration FILE with text of the kind to be served"),
        )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", builtin=True, source="Python's documentation")
    return case, "calibrated on Python's documentation, 4,096 tokens, because no text was given"


def good():
    return measured()
