"""C107 tokens-beyond-embedding: the tokenizer has tokens for which the embedding has no row.

Why: the first text that holds such a token stops the program; on a GPU with a device-side assertion. A fine-tune that added tokens and
saved the tokenizer, but not the larger embedding, leaves this.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- CUDA: `device-side assert triggered`
- ExLlamaV2: `exceeds dimension size (32001)`

Do: fetch the embedding that belongs to this tokenizer, or take the added tokens out of the tokenizer.

False alarms: placeholders for images and sound, which are replaced before the embedding is asked (Gemma 3), are not counted. An
embedding with more rows than tokens is healthy: rows are padded for speed.

Fix safety: manual; rows for new tokens are learnt, not invented.

Sources: turboderp/exllamav2 issue 52; NVIDIA/TensorRT-LLM issue 1272; google/gemma-3-1b: 262,145 tokens on 262,144 rows.
"""

import re

from doctor.rule import Fix, Place, Unavailable, finding, rule
from doctor.testing import tiny

PLACEHOLDER = re.compile(r"image|audio|video|vision|soft_token|speech", re.I)


@rule("C107", "error")
def tokens_beyond_embedding(checkpoint, tokenizer, embedding_rows):
    if embedding_rows is None:
        raise Unavailable("neither an embedding nor vocab_size is there")
    over = sorted((i, t) for t, i in tokenizer.ids.items() if i >= embedding_rows and not PLACEHOLDER.search(t))
    if over:
        noun = "token has" if len(over) == 1 else "tokens have"
        yield finding(f"{len(over):,} {noun} no row in the embedding of {embedding_rows:,} rows; the first is {over[0][1]} = {over[0][0]}",
                      at=Place("tokenizer.json"), evidence={"tokens": len(over), "rows": embedding_rows},
                      fix=Fix("fetch the embedding that belongs to this tokenizer, or take the tokens out of it", (), "manual"))


def bad():
    case = tiny()
    case.json["tokenizer.json"]["added_tokens"].append({"id": 96, "content": "<|tool|>", "special": True})
    return case, "1 token has no row in the embedding of 96 rows; the first is <|tool|> = 96"


def good():
    return tiny()
