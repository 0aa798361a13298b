"""C174 tokenizer-of-another-model: the tokenizer reaches far fewer tokens than the embedding has rows.

Why: embeddings are padded by a few rows, not by a fifth. A tokenizer that is so much smaller comes from another model:
its ids mean other words there. Everything loads, and the model reads and answers in noise.

Seen as:
- vLLM: words in no order from a model that loads without a warning
- llama.cpp: tokens named [PAD…] by the thousand

Do: take the tokenizer files of the base model; then look at special token ids again.

False alarms: models for which a smaller tokenizer was trained, and byte-level models with a padded embedding. A model with
fewer than 1,000 rows is not judged.

Fix safety: manual: which tokenizer belongs to the weights is not in the files.

Sources: the largest share of rows without a token among the families of rules/tables/special_tokens.json is 2 %
(Phi-2: 51,200 rows, 50,295 tokens).
"""

from doctor.lint.rule import Fix, Place, Unavailable, _, finding, rule
from doctor.lint.testing import tiny

MOST = 0.2  # share of rows without a token, from which on it is no padding
LEAST_ROWS = 1000


@rule("C174", "warning", certainty="likely", implied_by=("C107", "C110", "C111", "F002", "G330"))
def tokenizer_of_another_model(checkpoint, tokenizer, embedding_rows):
    if embedding_rows is None:
        raise Unavailable(_("neither an embedding nor vocab_size is there"))
    reached = tokenizer.largest_id + 1
    if embedding_rows < LEAST_ROWS or reached >= (1 - MOST) * embedding_rows:
        return
    yield finding(
        _(
            "the tokenizer's largest id is {last:,}; the embedding has {rows:,} rows, and no text reaches {unused:,} of them",
            last=reached - 1,
            rows=embedding_rows,
            unused=embedding_rows - reached,
        ),
        at=Place("tokenizer.json", pointer="/model/vocab"),
        evidence={"largest_id": reached - 1, "rows": embedding_rows},
        fix=Fix(_("take the tokenizer files of the base model"), (), "manual"),
    )


ROWS = 2000


def bad():
    case = good()
    vocab = case.json["tokenizer.json"]["model"]["vocab"]
    for token in [t for t, number in vocab.items() if number >= ROWS // 2]:
        del vocab[token]
    return case, ("the tokenizer's largest id is 999; the embedding has 2,000 rows, and no text reaches 1,000 of them")


def good():
    import numpy as np

    case = tiny()
    vocab = case.json["tokenizer.json"]["model"]["vocab"]
    old = case.config["vocab_size"]
    for name in [n for n, t in case.tensors.items() if t.shape[:1] == (old,)]:
        times = -(-ROWS // old)
        case.tensors[name] = np.concatenate([case.tensors[name]] * times)[:ROWS]
    vocab |= {f"word{number}": number for number in range(old, ROWS)}
    case.config["vocab_size"] = ROWS
    return case
