"""Q418 one-script: calibration text is of one script, and the vocabulary is made for others too.

Why: the Hessians weigh what the text uses. What only the other languages use is rounded as if nobody needed it, and a
check of perplexity on text of the same kind does not show that.

Do: add text of every language to be served, in the shares in which it is served.

False alarms: a model that serves this one language only. Languages of one script are not told apart, so silence says
little.

Fix safety: no fix: the text is yours.

Sources: Unicode names of the letters; Williams and Aletras, On the Impact of Calibration Data in Post-training
Quantization, arXiv 2311.09755.
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import change, measured


@rule("Q418", "info", certainty="hint")
def one_script(checkpoint, calibration):
    if calibration.builtin or len(calibration.scripts) != 1 or not calibration.unused_scripts:
        return
    yield finding(
        f"all calibration text is {calibration.scripts[0]}; the vocabulary is made for {', '.join(calibration.unused_scripts)} too",
        at=Place(calibration.source),
        evidence={"scripts": list(calibration.scripts), "unused": list(calibration.unused_scripts)},
        advice="add text of every language to be served",
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", scripts=("Latin",), unused_scripts=("CJK",))
    return case, "all calibration text is Latin; the vocabulary is made for CJK too"


def good():
    case = measured()
    change(case, "checkpoint:", "calibration", scripts=("Latin", "CJK"), unused_scripts=())
    return case
