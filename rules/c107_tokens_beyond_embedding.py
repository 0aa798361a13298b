"""C107 tokens-beyond-embedding: tokenizer has tokens without a row in the embedding.

Why: the first text with such a token stops the program, on a GPU with a device-side assertion. The cause is a fine-tune
that added tokens and saved the tokenizer, but not the larger embedding.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- CUDA: `device-side assert triggered`
- ExLlamaV2: `exceeds dimension size (32001)`

Do: fetch the embedding that belongs to this tokenizer, or remove the added tokens from the tokenizer. If it is enough
that the tokens do not stop the program, `--unsafe-fixes=C107` adds rows up to a multiple of 64 for each GPU.

False alarms: placeholders for images and audio, which are replaced before the embedding lookup (Gemma 3), are not
counted. An embedding with more rows than tokens is fine: rows are padded for speed.

Fix safety: unsafe, and only by name: rows for new tokens are learnt, and these are not. Each is the mean of the others,
in the head too. Its logit is then the mean of all logits and never the largest, while a row of zeros would win wherever
all others are below 0. Logits of the old tokens do not change; this is proved.

Sources: turboderp/exllamav2 issue 52; NVIDIA/TensorRT-LLM issue 1272; google/gemma-3-1b: 262,145 tokens on 262,144
rows.
"""

import re

from doctor.lint.rule import MISSING, Fix, GrowRows, Place, SetJson, Unavailable, _, finding, fits, listed, plural, rule
from doctor.lint.testing import tiny

UNIT = 64  # engines pad the vocabulary to a multiple of 64 rows themselves
MOST = 1.25  # times the rows; larger ids are a mistake in the tokenizer, not a few added tokens
OUTER = re.compile(r"embed|head|logits|vocab", re.I)
PLACEHOLDER = re.compile(r"image|audio|video|vision|soft_token|speech", re.I)


@rule("C107", "error")
def tokens_beyond_embedding(checkpoint, tokenizer, embedding_rows, spec, tensors, recipe):
    if embedding_rows is None:
        raise Unavailable(_("neither an embedding nor vocab_size is there"))
    over = sorted((i, t) for t, i in tokenizer.ids.items() if i >= embedding_rows and not PLACEHOLDER.search(t))
    if over:
        yield finding(
            plural(
                "{n:,} token has no row in the embedding of {rows:,} rows: {token} = {id}",
                "{n:,} tokens have no row in the embedding of {rows:,} rows; the first is {token} = {id}",
                len(over),
                rows=embedding_rows,
                token=over[0][1],
                id=over[0][0],
            ),
            at=Place("tokenizer.json"),
            evidence={"tokens": len(over), "rows": embedding_rows},
            fix=_more_rows(checkpoint, spec, tensors, embedding_rows, over[-1][0], UNIT * recipe.tp)
            or Fix(_("fetch the embedding that belongs to this tokenizer, or take the tokens out of it"), (), "manual"),
        )


def _more_rows(checkpoint, spec, tensors, rows, last, unit):
    """Fix that adds rows for every id to the embedding and a stored head; None where another tensor depends on the
    vocabulary size too.
    """
    names = [n for n in (spec.embed_tensor, spec.head_tensor) if n]
    names += [n for n in (f"{name.removesuffix('.weight')}.bias" for name in names) if n in tensors]
    others = [n for n, i in tensors.items() if n not in names and rows in i.shape and OUTER.search(n)]
    if not spec.embed_tensor or others or last > rows * MOST or any(tensors[n].shape[:1] != (rows,) for n in names):
        return None
    size, key = fits(last + 1, unit), spec.key_for("vocab_size")
    block = spec.section(checkpoint.value("config.json"))
    edits = (*(GrowRows(n, size) for n in names), SetJson("config.json", spec.at(key), size, block.get(key, MISSING)))
    title = plural(
        "add {n:,} row to {names}, the mean of the others: {key} {old:,} -> {new:,}",
        "add {n:,} rows to {names}, each the mean of the others: {key} {old:,} -> {new:,}",
        size - rows,
        names=listed(names),
        key=key,
        old=rows,
        new=size,
    )
    return Fix(
        title,
        edits,
        "unsafe",
        by_name=True,
        needs=("W201",),
    )


def bad():
    case = tiny()
    case.json["tokenizer.json"]["added_tokens"].append({"id": 96, "content": "<|tool|>", "special": True})
    return case, "1 token has no row in the embedding of 96 rows: <|tool|> = 96"


def good():
    return tiny()
