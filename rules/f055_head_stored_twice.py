"""F055 head-stored-twice: tied lm_head is stored as a second copy.

Why: nothing is read wrongly; the file is only larger than necessary. Tools that quantize the head but not the embedding
would break the tie: then one of the two copies is outdated.

Seen as:
- AutoGPTQ: `Some tensors share memory`
- safetensors: `Some tensors share memory, this will lead to duplicate memory on disk and potential differences when loading them again`

Do: drop the copy.

False alarms: none: the bytes are equal.

Fix safety: safe: the dropped tensor is equal to the embedding, byte for byte.

Sources: AutoGPTQ PR 536; huggingface/safetensors docs, "Torch shared tensors".
"""

from doctor.lint.rule import DropTensor, Fix, Place, _, finding, rule
from doctor.lint.testing import tiny


@rule("F055", "info")
def head_stored_twice(checkpoint, spec, head_equals_embed):
    if spec.tied and head_equals_embed:
        head = checkpoint.tensors[spec.head_tensor]
        yield finding(
            _(
                "{head} is tied to {embed} and also stored as a copy: {size:,} bytes twice",
                head=spec.head_tensor,
                embed=spec.embed_tensor,
                size=head.nbytes,
            ),
            at=Place(head.shard, tensor=spec.head_tensor),
            evidence={"bytes": head.nbytes},
            fix=Fix(_("drop {name}", name=spec.head_tensor), (DropTensor(spec.head_tensor),)),
        )


def bad():
    case = tiny()
    case.config["tie_word_embeddings"] = True
    case.tensors[case.head], case.dtypes[case.head] = case.tensors[case.spec.embed_tensor or ""].copy(), "BF16"
    return case, "lm_head.weight is tied to model.embed_tokens.weight and also stored as a copy: 12,288 bytes twice"


def good():
    return tiny()
