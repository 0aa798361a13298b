"""Q418 one-script: calibration text has one script only, the vocabulary more.

Why: the Hessians weigh what the text uses. Weights that only other languages use are rounded without guidance, and a
perplexity check on the same kind of text does not show it.

Do: add text of every language to be served, in the proportions of its use.

False alarms: a model that serves this one language only. Languages of one script are not distinguished, so no finding
says little.

Fix safety: no fix: the text is yours.

Sources: Unicode names of the letters; Williams and Aletras, On the Impact of Calibration Data in Post-training
Quantization, arXiv 2311.09755.
"""

from doctor.lint.rule import Place, _, finding, listed, rule
from doctor.lint.testing import change, measured


@rule("Q418", "info", certainty="hint")
def one_script(checkpoint, calibration):
    if calibration.builtin or len(calibration.scripts) != 1 or not calibration.unused_scripts:
        return
    yield finding(
        _(
            "all calibration text is {script}; the vocabulary also covers {unused}",
            script=calibration.scripts[0],
            unused=listed(calibration.unused_scripts),
        ),
        at=Place(calibration.source),
        evidence={"scripts": list(calibration.scripts), "unused": list(calibration.unused_scripts)},
        advice=_("add text of every language to be served"),
    )


def bad():
    case = measured()
    change(case, "checkpoint:", "calibration", scripts=("Latin",), unused_scripts=("CJK",))
    return case, "all calibration text is Latin; the vocabulary also covers CJK"


def good():
    case = measured()
    change(case, "checkpoint:", "calibration", scripts=("Latin", "CJK"), unused_scripts=())
    return case
