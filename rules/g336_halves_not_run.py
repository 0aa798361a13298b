"""G336 halves-not-run: the recipe runs the model, which has an encoder and a decoder.

Why: doctor calibrates by running the decoder layers of a language model one after another. A model of an encoder and a
decoder (T5, BART, Marian, Whisper) is not run: its weights can be rounded without calibration, in both halves.

Seen as:
- transformers: `Unrecognized configuration class`
- vLLM: `are not supported for now`

Do: choose a scheme without calibration: --scheme FP8_DYNAMIC or INT8, or NVFP4A16 and MXFP4A16 with --for rtn.

False alarms: none known.

Fix safety: manual: which scheme to serve is the user's choice.

Sources: transformers src/transformers/models/auto/modeling_auto.py, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
"""

from doctor.lint.rule import HALVES, KINDS, Place, _, finding, rule, streams
from doctor.lint.testing import tiny


@rule("G336", "error")
def halves_not_run(checkpoint, kind, recipe, goal):
    config = checkpoint.value("config.json") or {}
    if kind not in HALVES or config.get("is_encoder_decoder") is not True or goal != "quantize" or streams(recipe):
        return
    yield finding(
        _(
            "{kind}: doctor runs decoder language models alone, and {method} needs to run it",
            kind=KINDS[kind],
            method=recipe.label(),
        ),
        at=Place("config.json", pointer="/architectures"),
        evidence={"kind": kind},
        advice=_("choose a scheme without calibration: --scheme FP8_DYNAMIC or --scheme INT8"),
    )


def bad():
    case = tiny()
    case.config.update(is_encoder_decoder=True, architectures=["BartForConditionalGeneration"], model_type="bart")
    return case, "encoder-decoder model: doctor runs decoder language models alone, and gptq 4-bit g32 needs to run it"


def good():
    return tiny()
