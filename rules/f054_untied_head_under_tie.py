"""F054 untied-head-under-tie: tie_word_embeddings is true, but the stored lm_head differs.

Why: vLLM and transformers 4 tie them and discard the stored head; transformers 5 keeps it and warns. So two programs
run two models from one directory, and a quantized copy depends on the program that wrote it.

Seen as:
- transformers: `The tied weights mapping and config for this model specifies to tie`

Do: find out which is intended. Fine-tuning that trained the head needs tie_word_embeddings false.

False alarms: none known: the bytes of the two tensors differ.

Fix safety: unsafe: false keeps the stored weights, which is right if the head was trained. With `--from`, a donor that
does not tie them makes it safe.

Sources: tried with transformers 5.23: tie true and a different stored head loads untied; vllm-project/vllm
vllm/model_executor/models/llama.py, `tie_weights`.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, rule
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
        _(
            "tie_word_embeddings is true, but {head} differs from {embed}",
            head=spec.head_tensor,
            embed=spec.embed_tensor,
        ),
        at=Place(
            "config.json",
            pointer=at,
            note=_("{head} is stored, {size:,} bytes", head=spec.head_tensor, size=head.nbytes),
        ),
        fix=Fix(
            _('set "{key}": {value} (keeps the stored head)', key="tie_word_embeddings", value="false"),
            (SetJson("config.json", at, False, config.get("tie_word_embeddings", MISSING)),),
            "safe" if base and base.ties() is False else "unsafe",
        ),
    )


def bad():
    case = tiny()
    case.config["tie_word_embeddings"] = True
    if case.head not in case.tensors:
        case.tensors[case.head], case.dtypes[case.head] = case.tensors[case.spec.embed_tensor or ""][::-1], "BF16"
    return case, "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight"


def good():
    return tiny()
