"""C103 special-id-out-of-range: a special token's id has no row in the embedding.

Why: the id is looked up in the embedding as soon as a text starts or a batch is padded: on a GPU that is a device-side
assertion that takes the whole process with it. An EOS that cannot be produced never ends a reply.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- CUDA: `device-side assert triggered`
- PyTorch: `CUDA error: device-side assert triggered`

Do: set the id that the tokenizer has for this token. Where the token was added in training, the larger embedding was
not saved.

False alarms: -1 for a pad token, an old way to say "none", is left alone.

Fix safety: safe where tokenizer_config.json names the token and the tokenizer has it within the embedding; else manual.

Sources: pytorch/pytorch aten/src/ATen/native/cuda/Indexing.cu; NVIDIA/TensorRT-LLM issue 1272.
"""

from doctor.lint.rule import Fix, Place, SetJson, Unavailable, finding, rule
from doctor.lint.testing import tiny


@rule("C103", "error")
def special_id_out_of_range(checkpoint, special, embedding_rows, json_files):
    if embedding_rows is None:
        raise Unavailable("neither an embedding nor vocab_size is there")
    for stated in special.statements:
        for number in stated.ids:
            if number < embedding_rows and (number >= 0 or (stated.role == "pad" and number == -1)):
                continue
            yield finding(
                f"{stated.role}_token_id {number} in {stated.file}; the embedding has rows 0 to {embedding_rows - 1:,}",
                at=Place(stated.file, pointer=stated.pointer, note=f"the embedding has {embedding_rows:,} rows"),
                evidence={"id": number, "rows": embedding_rows},
                fix=_fix(checkpoint, special, stated, number, embedding_rows),
            )


def _fix(checkpoint, special, stated, number, rows):
    """The id of the token that tokenizer_config.json names for this role, if the tokenizer has it in range."""
    document = checkpoint.value("tokenizer.json") or {}
    added = {t.get("content"): t.get("id") for t in document.get("added_tokens") or () if isinstance(t, dict)}
    right = added.get(special.names.get(stated.role))
    if not isinstance(right, int) or not 0 <= right < rows:
        return Fix("set the id that the tokenizer has for this token, or fetch the larger embedding", (), "manual")
    value = [right if v == number else v for v in stated.value] if isinstance(stated.value, list) else right
    return Fix(
        f'set "{stated.role}_token_id": {value} ({special.names[stated.role]} in tokenizer.json)',
        (SetJson(stated.file, stated.pointer, value, stated.value),),
    )


def bad():
    case = tiny()
    case.config["pad_token_id"] = 96
    return case, "pad_token_id 96 in config.json; the embedding has rows 0 to 95"


def good():
    return tiny()
