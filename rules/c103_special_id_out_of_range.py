"""C103 special-id-out-of-range: special token id is outside the embedding.

Why: the id is looked up in the embedding as soon as a text starts or a batch is padded. On a GPU that is a device-side
assertion that ends the whole process. An EOS that cannot be generated never ends a reply.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- CUDA: `device-side assert triggered`
- PyTorch: `CUDA error: device-side assert triggered`

Do: set the id that the tokenizer has for this token. Where the token was added in training, the larger embedding was
not saved.

False alarms: -1 for a pad token, an old way to write "none", is not reported.

Fix safety: safe where tokenizer_config.json names the token and the tokenizer has it within the embedding; else manual.

Sources: pytorch/pytorch aten/src/ATen/native/cuda/Indexing.cu; NVIDIA/TensorRT-LLM issue 1272.
"""

from doctor.lint.rule import Fix, Place, SetJson, Unavailable, _, finding, rule
from doctor.lint.testing import tiny

MOST = 100  # ids of one role that a fix writes anew; no model has more


@rule("C103", "error", implied_by=("G330",))
def special_id_out_of_range(checkpoint, special, embedding_rows, json_files):
    if embedding_rows is None:
        raise Unavailable(_("neither an embedding nor vocab_size is there"))
    for stated in special.statements:
        for number in stated.ids:
            if number < embedding_rows and (number >= 0 or (stated.role == "pad" and number == -1)):
                continue
            yield finding(
                _(
                    "{key} {id} in {file}; the embedding has rows 0 to {last:,}",
                    key=f"{stated.role}_token_id",
                    id=number,
                    file=stated.file,
                    last=embedding_rows - 1,
                ),
                at=Place(
                    stated.file,
                    pointer=stated.pointer,
                    note=_("the embedding has {rows:,} rows", rows=embedding_rows),
                ),
                evidence={"id": number, "rows": embedding_rows},
                fix=_fix(checkpoint, special, stated, number, embedding_rows),
            )


def _fix(checkpoint, special, stated, number, rows):
    """The id of the token that tokenizer_config.json names for this role, if the tokenizer has it in range."""
    document = checkpoint.value("tokenizer.json") or {}
    listed = document.get("added_tokens")
    listed = listed if isinstance(listed, list) else ()
    added = {t.get("content"): t.get("id") for t in listed if isinstance(t, dict) and isinstance(t.get("content"), str)}
    right = added.get(special.names.get(stated.role))
    many = isinstance(stated.value, list) and len(stated.value) > MOST
    if not isinstance(right, int) or not 0 <= right < rows or many:
        return Fix(_("set the id that the tokenizer has for this token, or fetch the larger embedding"), (), "manual")
    value = [right if v == number else v for v in stated.value] if isinstance(stated.value, list) else right
    return Fix(
        _(
            'set "{key}": {value} ({token} in tokenizer.json)',
            key=f"{stated.role}_token_id",
            value=value,
            token=special.names[stated.role],
        ),
        (SetJson(stated.file, stated.pointer, value, stated.value),),
    )


def bad():
    case = tiny()
    case.config["pad_token_id"] = 96
    return case, "pad_token_id 96 in config.json; the embedding has rows 0 to 95"


def good():
    return tiny()
