"""F073 gguf-metadata-missing: metadata that llama.cpp needs is absent.

Why: llama.cpp builds the model from the metadata of its architecture and stops at the first key that it cannot do
without. A size of 0, an epsilon that is negative or NaN, a rotary base of 0 are as good as none: they end the load, or
make every activation NaN.

Seen as:
- llama.cpp: `error loading model hyperparameters: key not found in model`

Do: convert the model again with a converter of its architecture; `doctor quantize --scheme Q8_0` writes all keys.

False alarms: an architecture that needs fewer keys than a decoder has; only those that every decoder needs are asked for,
and an epsilon of the architectures that F074 judges.

Fix safety: manual; the values stand in the original's config.json.

Sources: ggml-org/llama.cpp src/llama-model.cpp (load_hparams), src/llama-vocab.cpp (load).
"""

import math

from doctor.lint.rule import Place, _, architecture_in, finding, listed, rule
from doctor.lint.testing import tiny_gguf, w

EPSILON, ROTATED = "attention.layer_norm_rms_epsilon", "rope.dimension_count"
SCALINGS = ("none", "linear", "yarn", "longrope")
NO_TOKENS = ("none", "no_vocab")  # tokenizers of which the vocabulary's size is all that is read
SIZES = ("block_count", "context_length", "embedding_length", "attention.head_count")


@rule("F073", "error", implied_by=("F070", "F072", "F077"))
def gguf_metadata_missing(checkpoint, gguf_models):
    for model in gguf_models:
        if model.metadata.get("general.type", "model") != "model" or model.architecture == "clip":
            continue  # an importance matrix, an adapter, the projector beside a model
        name = model.architecture
        missing = [] if name else ["general.architecture"]
        missing += [f"{name}.{key}" for key in SIZES if name and not _is_size(model.own(key))]
        if "tokenizer.ggml.model" not in model.metadata:
            missing.append("tokenizer.ggml.model")
        elif model.metadata["tokenizer.ggml.model"] not in NO_TOKENS and not model.metadata.get(
            "tokenizer.ggml.tokens"
        ):
            missing.append("tokenizer.ggml.tokens")
        elif model.metadata["tokenizer.ggml.model"] == "gpt2" and not model.metadata.get("tokenizer.ggml.merges"):
            missing.append("tokenizer.ggml.merges")
        elif model.metadata["tokenizer.ggml.model"] in NO_TOKENS and not _is_size(model.own("vocab_size")):
            missing.append(f"{name}.vocab_size")
        known = architecture_in(model)
        if known is not None:
            missing += [f"{name}.{key}" for key in _impossible(model)]
        if missing:
            yield finding(
                _("{model}: lacks {keys}", model=model.name, keys=listed(missing)),
                at=Place(model.files[0].name),
                evidence={"keys": missing},
                advice=_("convert the model again"),
            )
        elif known is not None and known.rope_dimension:
            yield from _rotated(model)
        scaling = model.own("rope.scaling.type", "none") if known is not None else "none"
        if scaling not in SCALINGS:
            yield finding(
                _(
                    "{model}: {key} is {value}; must be one of {wanted}",
                    model=model.name,
                    key=f"{name}.rope.scaling.type",
                    value=repr(scaling),
                    wanted=listed(SCALINGS),
                ),
                at=Place(model.files[0].name),
                evidence={"value": scaling},
                advice=_("convert the model again"),
            )


def _rotated(model):
    """llama.cpp rotates whole heads in these architectures and refuses another number."""
    heads, hidden = model.own("attention.head_count"), model.own("embedding_length")
    if isinstance(heads, int) and heads and isinstance(hidden, int):
        wanted = model.own("attention.key_length", hidden // heads)
        found = model.own(ROTATED, wanted)
        if found != wanted:
            yield finding(
                _(
                    "{model}: {key} is {value}; must be {wanted}, the size of a head",
                    model=model.name,
                    key=f"{model.architecture}.{ROTATED}",
                    value=found,
                    wanted=wanted,
                ),
                at=Place(model.files[0].name),
                evidence={"value": found, "wanted": wanted},
                advice=_("convert the model again"),
            )


def _impossible(model):
    """Keys of a known architecture whose values end the load, or make every activation NaN."""
    epsilon, base = model.own(EPSILON), model.own("rope.freq_base", 1.0)
    if not (isinstance(epsilon, float) and 0 <= epsilon < math.inf):
        yield EPSILON
    if not (isinstance(base, (int, float)) and 0 < base < math.inf):
        yield "rope.freq_base"
    if model.own("attention.head_count_kv", 1) == 0:
        yield "attention.head_count_kv"
    if model.own("expert_count") and not _is_size(model.own("expert_used_count")):
        yield "expert_used_count"


def _is_size(value):
    """Whether a value is a positive number, or one for each layer."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values) and any(values)


def bad():
    case = tiny_gguf()
    del case.keys[f"{case.family}.block_count"]
    return case, f"model.gguf: lacks {case.family}.block_count"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    for key, value in (
        ("rope.scaling.type", w.text("dynamic")),
        ("rope.dimension_count", w.u32(32)),
        ("rope.freq_base", w.f32(0.0)),
    ):
        case = tiny_gguf()
        case.keys[f"{case.family}.{key}"] = value
        yield case
