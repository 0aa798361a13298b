"""G330 not-a-decoder: directory is not a decoder language model.

Why: doctor runs the decoder layers of language models, and the formats that it writes are read for these alone. What
is here was checked as far as its files go; a plan for it cannot be carried out. Models of an encoder and a decoder (T5,
BART, Whisper) can be rounded without calibration: rule G336 judges them.

Seen as:
- transformers: `Unrecognized configuration class`
- vLLM: `are not supported for now`

Do: name the directory of the language model. A diffusers pipeline has its text encoder in a subfolder. Take the
original 16-bit weights in place of a model that is exported to ONNX or quantized by MLX.

False alarms: none known. A kind that is not known is not judged.

Fix safety: manual: it is another model.

Sources: transformers src/transformers/models/auto/modeling_auto.py, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
"""

from doctor.lint.rule import HALVES, KINDS, Fix, Place, _, finding, rule
from doctor.lint.testing import tiny

OTHERS = ("encoder-decoder", "two-encoders", "vision", "audio", "pipeline", "component", "mlx", "onnx")


@rule("G330", "error")
def not_a_decoder(checkpoint, kind, goal):
    if kind not in OTHERS or (kind == "mlx" and goal != "quantize"):
        return
    config = checkpoint.value("config.json") or {}
    if kind in HALVES and config.get("is_encoder_decoder") is True:
        return  # G336 judges whether the recipe needs to run it
    at = (
        Place("model_index.json", pointer="/_class_name")
        if kind == "pipeline"
        else Place("config.json", pointer="/architectures")
    )
    yield finding(
        _("{kind}: doctor quantizes decoder language models alone", kind=KINDS[kind]),
        at=at,
        evidence={"kind": kind},
        fix=Fix(_("name the directory of a decoder language model"), (), "manual"),
    )


def bad():
    case = tiny()
    case.files["model_index.json"] = b'{"_class_name": "StableDiffusionPipeline"}'
    return case, "diffusers pipeline: doctor quantizes decoder language models alone"


def good():
    return tiny()
