"""F053 missing-head: lm_head is missing and not tied to the embedding.

Why: transformers initializes the head with random numbers and prints one line; the model then generates noise.
Converters that drop the tied copy and forget the flag cause this.

Seen as:
- transformers: `lm_head.weight`
- llama.cpp: `missing tensor 'output.weight'`
- llama.cpp: `token_embd.weight not found`

Do: set tie_word_embeddings to true if the base model ties them; else fetch the shard that holds the head.

False alarms: models without a language-model head (embedding models) under a CausalLM name.

Fix safety: unsafe: it is right only if the model was trained with one matrix for both. With `--from` the donor decides.
A donor that ties them makes the flag safe. A donor that stores a head provides it: unsafe, because this model's head
may have been trained.

Sources: QwenLM/Qwen issue 1101; tried with transformers 5.23.
"""

from doctor.lint.rule import LOST_DATA, MISSING, Fix, Place, SetJson, _, family_table, finding, rule
from doctor.lint.testing import tiny

HEAD = "lm_head.weight"
# Classes over a decoder whose head is not lm_head: the end of their names -> what the head's tensor is called
# (transformers src/transformers/modeling_layers.py, GenericFor…).
HEADS = {
    "ForSequenceClassification": "score.weight",
    "ForTokenClassification": "score.weight",
    "ForQuestionAnswering": "qa_outputs.weight",
}


@rule("F053", "error", implied_by=(*LOST_DATA, "F057", "F058", "F061", "C147", "O620"))
def missing_head(checkpoint, placement, config, tensors, base):
    spec = placement.spec
    yield from _other_head(spec, tensors, config)
    if (
        spec.tied
        or spec.head_tensor
        or not spec.embed_tensor
        or spec.family is None
        or "CausalLM" not in spec.architecture
    ):
        return
    at = (
        "/tie_word_embeddings"
        if "tie_word_embeddings" in config or not spec.text_key
        else spec.at("tie_word_embeddings")
    )
    yield finding(
        _("no lm_head.weight, and tie_word_embeddings is false")
        if spec.tie_stated is False
        else _(
            "no lm_head.weight, and tie_word_embeddings is not stated (default for {family}: false)", family=spec.family
        ),
        at=Place("config.json", pointer=at),
        evidence={"tied": False},
        fix=_fix(spec, tensors, SetJson("config.json", at, True, config.get("tie_word_embeddings", MISSING)), base),
        advice=_(
            "set the flag if the base model ties head and embedding; else fetch the shard that holds lm_head.weight"
        ),
    )


def _other_head(spec, tensors, config):
    """The head that another class over the same decoder needs: a classifier of sequences has `score`, no lm_head."""
    own = family_table(spec.family).get("architecture", "")
    kind = next((k for k in HEADS if spec.architecture.endswith(k)), None)
    if kind is None or config.get("auto_map") or not own.endswith("ForCausalLM") or HEADS[kind] in tensors:
        return
    if spec.architecture.removesuffix(kind) != own.removesuffix("ForCausalLM") or not spec.embed_tensor:
        return
    edit = SetJson("config.json", "/architectures", [own], config.get("architectures", MISSING))
    yield finding(
        _("no {tensor}, which {architecture} needs", tensor=HEADS[kind], architecture=spec.architecture),
        at=Place("config.json", pointer="/architectures/0"),
        evidence={"architecture": spec.architecture},
        fix=Fix(_('set "{key}": {value}', key="architectures", value=[own]), (edit,), "unsafe")
        if spec.head_tensor or spec.tied
        else Fix(_("fetch the shard that holds it"), (), "manual"),
        advice=_("transformers starts a missing head from random numbers"),
    )


def _fix(spec, tensors, flag, base):
    key, value = "tie_word_embeddings", "true"
    head = base.ties() if base else None
    if head is True:
        return Fix(_('set "{key}": {value}, as {base} does', key=key, value=value, base=base.text), (flag,))
    embed = tensors.get(spec.embed_tensor)
    taken = base.offer(HEAD, embed.dtype.name, embed.shape) if head is False and embed is not None else None
    if taken:
        return Fix(_("take {name} from {base}", name=HEAD, base=base.text), (taken,), "unsafe")
    return Fix(_('set "{key}": {value}', key=key, value=value), (flag,), "unsafe")


def bad():
    case = tiny()
    case.config["tie_word_embeddings"] = False
    case.tensors.pop(case.head, None)
    return case, "no lm_head.weight, and tie_word_embeddings is false"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    own = case.config["architectures"][0]
    case.config["architectures"] = [own.replace("ForCausalLM", "ForSequenceClassification")]
    yield case
