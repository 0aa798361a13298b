"""F067 gguf-projector-alone: only the projector of a multimodal model is here, and no language model.

Why: llama.cpp keeps the part that turns images or sound into embeddings in a file of its own (mmproj). It is loaded
beside a language model and answers nothing alone.

Seen as:
- llama.cpp: `CLIP cannot be used as main model, use it with --mmproj instead`

Do: put the GGUF file of the language model beside it, and name that one to llama.cpp with `-m`.

False alarms: a directory for projectors alone, whose language model lies elsewhere.

Fix safety: manual; the language model is not here.

Sources: ggml-org/llama.cpp src/llama-model.cpp (load_arch), tools/mtmd.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gguf, w


@rule("F067", "warning", implied_by=("F070", "F072"))
def gguf_projector_alone(checkpoint, gguf_models):
    if all(model.architecture == "clip" for model in gguf_models):
        model = gguf_models[0]
        yield finding(
            _("{model} is the projector of a multimodal model; its language model is not here", model=model.name),
            at=Place(model.files[0].name),
            advice=_("put the GGUF file of the language model beside it"),
        )


def bad():
    case = tiny_gguf()
    case.keys["general.architecture"] = w.text("clip")
    return case, "model.gguf is the projector of a multimodal model; its language model is not here"


def good():
    return tiny_gguf()
