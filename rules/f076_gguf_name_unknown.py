"""F076 gguf-name-unknown: llama.cpp knows no architecture or tokenizer of a stated name.

Why: llama.cpp has code for each architecture, each kind of tokenizer and each way to cut text before its merges, and
finds it by the name in the metadata. Where it has none of that name, it stops while it loads. Converters of other
projects write names of their own, and files of a new model need a llama.cpp that is as new.

Seen as:
- llama.cpp: `unknown model architecture:`
- llama.cpp: `error loading model vocabulary: unknown tokenizer:`
- llama.cpp: `error loading model vocabulary: unknown pre-tokenizer type:`

Do: convert the model again with llama.cpp's own converter; where the name is of a newer model, use a newer llama.cpp.

False alarms: a llama.cpp that is newer than the one whose names were taken, or a fork of it.

Fix safety: manual; which of the known names would compute the same is not in the file.

Sources: ggml-org/llama.cpp src/llama-arch.cpp (LLM_ARCH_NAMES), src/llama-vocab.cpp (load).
"""

from doctor.lint.rule import Place, _, finding, rule, table
from doctor.lint.testing import tiny_gguf, w

PRE = "tokenizer.ggml.pre"
BYTES = ("gpt2", "hybriddna", "whitespace")  # tokenizers that cut text before their merges by the name of PRE


@rule("F076", "error", implied_by=("F070", "F072", "F077"))
def gguf_name_unknown(checkpoint, gguf_models):
    known = table("llama_cpp")
    for model in gguf_models:
        if model.metadata.get("general.type", "model") != "model" or not model.architecture:
            continue
        tokenizer, cut = model.metadata.get("tokenizer.ggml.model"), model.metadata.get(PRE, "")
        for key, name, names in (
            ("general.architecture", model.architecture, "architectures"),
            ("tokenizer.ggml.model", tokenizer, "tokenizers"),
            (PRE, cut if tokenizer in BYTES else "", "pre_tokenizers"),
        ):
            if isinstance(name, str) and name and name not in known[names]:
                yield finding(
                    _(
                        "{model}: {key} is {name!r}, a name that llama.cpp of {version} does not know",
                        model=model.name,
                        key=key,
                        name=name,
                        version=known["version"],
                    ),
                    at=Place(model.files[0].name),
                    evidence={"key": key, "name": name},
                    advice=_("convert the model again with llama.cpp's converter, or use a newer llama.cpp"),
                )


def bad():
    case = tiny_gguf()
    case.keys[PRE] = w.text("my-own")
    return case, f"model.gguf: {PRE} is 'my-own', a name that llama.cpp of 2026-10 does not know"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gguf()
    case.keys["tokenizer.ggml.model"] = w.text("tiktoken")
    yield case
