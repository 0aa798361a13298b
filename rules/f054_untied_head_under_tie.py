"""F054 untied-head-under-tie: config.json ties the head to the embedding, but the files hold another head.

Why: vLLM and transformers 4 tie them and throw the stored head away; transformers 5 keeps it and warns. So two programs
run two models from one directory, and a quantized copy depends on which wrote it.

Seen as:
- transformers: `The tied weights mapping and config for this model specifies to tie`

Do: find out which is meant. Fine-tuning that trained the head needs tie_word_embeddings false.

False alarms: none known: the bytes of the two tensors differ.

Fix safety: unsafe: false keeps the weights that are stored, which is right if the head was trained. With `--from` a
base model that does not tie them makes it safe.

Sources: tried with transformers 5.23: tie true and a different stored head loads untied; vllm-project/vllm
vllm/model_executor/models/llama.py, `tie_weights`.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny


@rule("F054", "error")
def untied_head_under_tie(checkpoint, spec, config, head_equals_embed, base):
    if not spec.tied or head_equals_embed is not False:
        return
    at = (
        "/tie_word_embeddings"
        if "tie_word_embeddings" in config or not spec.text_key
        else spec.at("tie_word_embeddings")
    )
    head = checkpoint.tensors[spec.head_tensor]
    yield finding(
        f"tie_word_embeddings is true, but {spec.head_tensor} differs from {spec.embed_tensor}",
        at=Place("config.json", pointer=at, note=f"{spec.head_tensor} is stored, {head.nbytes:,} bytes"),
        fix=Fix(
            'set "tie_word_embeddings": false (keeps the stored head)',
            (SetJson("config.json", at, False, config.get("tie_word_embeddings", MISSING)),),
            "safe" if base and base.ties() is False else "unsafe",
        ),
    )


def bad():
    case = tiny()
    case.config["tie_word_embeddings"] = True
    if case.head not in case.tensors:
        case.tensors[case.head], case.dtypes[case.head] = case.tensors[case.spec.embed_tensor][::-1], "BF16"
    return case, "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"


def good():
    return tiny()
