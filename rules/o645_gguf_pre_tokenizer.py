"""O645 gguf-pre-tokenizer: a byte-level tokenizer without the name of its pre-tokenizer.

Why: before its merges a byte-level tokenizer cuts the text by a rule of its own, which a GGUF file names in
tokenizer.ggml.pre. Without the name llama.cpp takes a rule of its own, cuts numbers, spaces and contractions otherwise
than in training, and says so only in its log: replies get worse without an error.

Seen as:
- llama.cpp: `missing pre-tokenizer type, using: 'default'`
- llama.cpp: `GENERATION QUALITY WILL BE DEGRADED! CONSIDER REGENERATING THE MODEL`

Do: convert the tokenizer again with a converter that knows it.

False alarms: a tokenizer that cuts text as llama.cpp's default does.

Fix safety: manual; the file does not say how its tokenizer cuts text.

Sources: ggml-org/llama.cpp src/llama-vocab.cpp (load).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gguf


@rule("O645", "warning", certainty="likely", implied_by=("F070", "F073"))
def gguf_pre_tokenizer(checkpoint, gguf_models):
    for model in gguf_models:
        stated = model.metadata.get("tokenizer.ggml.pre", "")
        if model.metadata.get("tokenizer.ggml.model") == "gpt2" and stated in ("", "default"):
            yield finding(
                _(
                    'tokenizer.ggml.pre of {model} is "{name}"; must name how its byte-level tokenizer cuts text',
                    model=model.name,
                    name=stated,
                ),
                at=Place(model.files[0].name),
                advice=_("convert the tokenizer again"),
            )


def bad():
    case = tiny_gguf()
    del case.keys["tokenizer.ggml.pre"]
    return case, 'tokenizer.ggml.pre of model.gguf is ""; must name how its byte-level tokenizer cuts text'


def good():
    return tiny_gguf()
