"""O643 gguf-token-ids: a GGUF file's token ids or lists do not fit its vocabulary.

Why: a special id past the tokens is refused or ignored when the model loads, so it never stops, or never begins as it was
trained. Lists of types or scores of another length are read past their end, an embedding with another number of rows
than tokens is refused, and a text that two tokens have ends the process.

Seen as:
- llama.cpp: `tokenizer.ggml.eos_token_id`
- llama.cpp: `duplicate token in vocabulary:`
- llama.cpp: `GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed`

Do: convert the tokenizer again.

False alarms: none known; an id of padding, of no use in a decoder, is a warning.

Fix safety: manual; the ids stand in the original's tokenizer.

Sources: ggml-org/llama.cpp src/llama-vocab.cpp (load: special_token_types, token_type, scores).
"""

from doctor.lint.rule import Place, _, finding, plural, rule
from doctor.lint.testing import tiny_gguf, w

# Ids without which a reply does not begin or end as it was trained; llama.cpp sets any other aside with a warning.
STOPS = ("bos", "eos", "eot", "eom", "cls", "seperator")


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
                    severity="error" if key.removeprefix("tokenizer.ggml.").startswith(STOPS) else "warning",
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
        yield from _twice(model, tokens, place)
        for name in ("token_embd.weight", "output.weight"):
            held = model.tensors.get(name)
            if held is not None and len(held.shape) == 2 and held.shape[0] != count:
                yield finding(
                    _(
                        "{model}: {tensor} has {rows:,} rows for {count:,} tokens",
                        model=model.name,
                        tensor=name,
                        rows=held.shape[0],
                        count=count,
                    ),
                    at=Place(held.file, tensor=name),
                    evidence={"rows": held.shape[0], "tokens": count},
                    advice=_("convert the model again"),
                )


def _twice(model, tokens, place):
    """Tokens of one text: llama.cpp stops at the second. It gives tokens without a text names of their own."""
    first: dict[str, int] = {}
    texts = ((i, t) for i, t in enumerate(tokens) if t and isinstance(t, str))  # other types are F077's
    again = [(first[t], i) for i, t in texts if first.setdefault(t, i) != i]
    if again:
        one, other = again[0]
        yield finding(
            plural(
                "{model}: tokens {one:,} and {other:,} are both {text!r}; llama.cpp stops at the second",
                "{model}: {n:,} tokens have the text of an earlier one, such as {other:,} that of {one:,}, {text!r}; "
                "llama.cpp stops at the first of them",
                len(again),
                model=model.name,
                one=one,
                other=other,
                text=tokens[one][:40],
            ),
            at=place,
            evidence={"tokens": [i for _one, i in again[:100]]},
            advice=_("convert the tokenizer again"),
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
    case = tiny_gguf()
    tokens = case.keys["tokenizer.ggml.tokens"].value
    case.keys["tokenizer.ggml.tokens"] = w.texts([*tokens[:-1], tokens[0]])
    yield case
