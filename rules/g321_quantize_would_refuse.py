"""G321 quantize-would-refuse: quantize cannot run this model.

Why: what is true of the files may still not be true of the model. quantize builds transformers' own class of config.json,
finds a tensor for each of its parameters, and runs its decoder layers one after another. A model of an encoder and a
decoder, one whose class transformers does not define, or one whose layers do more than that stops there.

Seen as:
- transformers: `Unrecognized configuration class`
- transformers: `does not recognize this architecture`
- llm-compressor: `Could not find targets`

Do: what the finding says. The same steps ran on headers alone, without a byte of the weights: a run would end with the
same words.

False alarms: none known: it is quantize's own answer.

Fix safety: no fix: which model to quantize is the user's choice.

Sources: doctor's own quantizer; transformers src/transformers/models/auto/modeling_auto.py.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, rehearsed


@rule("G321", "error", implied_by=("C147", "C173", "F001", "F005", "F050", "F053", "F064", "F078", "G335"))
def quantize_would_refuse(checkpoint, rehearsal):
    if rehearsal.refused:
        yield finding(
            _("quantize would refuse it: {why}", why=rehearsal.refused.removesuffix(".")),
            advice=rehearsal.advice,
        )


def bad():
    case = rehearsed()
    change(case, "checkpoint:", "given_rehearsal", refused="config.json#/model_type: t5 is an encoder and a decoder.")
    return case, "quantize would refuse it: config.json#/model_type: t5 is an encoder and a decoder"


def good():
    return rehearsed()
