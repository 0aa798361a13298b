"""O643 gguf-token-ids: a GGUF file's token ids or lists do not fit its vocabulary.

Why: a special id past the tokens is refused or ignored when the model loads, so it never stops, or never begins as it was
trained. Lists of types or scores of another length are read past their end, and an embedding with fewer rows than tokens
crashes at the first of them.

Seen as:
- llama.cpp: `tokenizer.ggml.eos_token_id`

Do: convert the tokenizer again.

False alarms: an embedding with more rows than tokens is not counted: converters pad it.

Fix safety: manual; the ids stand in the original's tokenizer.

Sources: ggml-org/llama.cpp src/llama-vocab.cpp (load: special_token_types, token_type, scores).
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny_gguf, w


@rule("O643", "error", implied_by=("F070", "F071", "F072", "F073"))
def gguf_token_ids(checkpoint, gguf_models):
    for model in gguf_models:
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            continue
        count, place = len(tokens), Place(model.files[0].name)
        for key, value in model.metadata.items():
            special = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
            if special and not (isinstance(value, int) and 0 <= value < count):
                yield finding(
                    _(
                        "{model}: {key} is {value}; must be below the {count:,} tokens",
                        model=model.name,
                        key=key,
                        value=value,
                        count=count,
                    ),
                    at=place,
                    evidence={"id": value, "tokens": count},
                    advice=_("convert the tokenizer again"),
                )
        for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            values = model.metadata.get(key)
            if isinstance(values, list) and len(values) != count:
                yield finding(
                    _(
                        "{model}: {key} has {n:,} entries for {count:,} tokens",
                        model=model.name,
                        key=key,
                        n=len(values),
                        count=count,
                    ),
                    at=place,
                    evidence={"entries": len(values), "tokens": count},
                    advice=_("convert the tokenizer again"),
                )
        embedding = model.tensors.get("token_embd.weight")
        if embedding is not None and len(embedding.shape) == 2 and embedding.shape[0] != count:
            yield finding(
                _(
                    "{model}: token_embd.weight has {rows:,} rows for {count:,} tokens",
                    model=model.name,
                    rows=embedding.shape[0],
                    count=count,
                ),
                at=Place(embedding.file, tensor=embedding.name),
                evidence={"rows": embedding.shape[0], "tokens": count},
                advice=_("convert the model again"),
            )


def bad():
    case = tiny_gguf()
    case.keys["tokenizer.ggml.eos_token_id"] = w.u32(96)
    return case, "model.gguf: tokenizer.ggml.eos_token_id is 96; must be below the 96 tokens"


def good():
    return tiny_gguf()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gguf()
    case.keys["tokenizer.ggml.token_type"] = w.i32s([1] * 95)
    yield case
