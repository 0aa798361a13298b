"""O613 unexpected-packed: router or lm_head is packed, which engines do not expect.

Why: engines build routers as plain linears, and the head too unless the config has lm_head: true. They then have no
parameter for the packed tensors. Routers also decide by small differences, which four bits do not keep. Where
tie_word_embeddings is true, the head is the embedding: vLLM passes a packed one over, and transformers finds no weight
to tie.

Seen as:
- vLLM: `KeyError: 'model.layers.0.mlp.gate.g_idx'`
- vLLM: `KeyError: 'lm_head.qweight'`
- transformers: `AttributeError: Linear has no attribute `weight_packed``

Do: quantize again with these left out; for a packed head set lm_head to true.

False alarms: an engine that reads from the tensors which linears are packed.

Fix safety: safe for the flag of the head; no fix for routers.

Sources: vllm-project/vllm issue 25029, vllm/model_executor/layers/quantization/gptq.py (lm_head_quantized).
"""

import re

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, rule, word_tails
from doctor.lint.testing import never_in, np, tiny_gptq

ROUTER = re.compile(r"\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)$")
HEAD = re.compile(r"(?:^|\.)lm_head$")


@rule("O613", "warning", certainty="likely")
def unexpected_packed(checkpoint, tensors, stored_weights, spec, quantization=None):
    for name, info in tensors.items():
        words = name.endswith(word_tails())
        if not words and name not in stored_weights:
            continue
        module = name.rpartition(".")[0]
        if ROUTER.search(module):
            yield finding(
                _("{tensor}: router is packed", tensor=name),
                at=Place(info.shard, tensor=name),
                advice=_("quantize again with routers left out"),
            )
        elif words and quantization is not None and HEAD.search(module):
            yield from _head(quantization, name)
            if spec.lookup("tie_word_embeddings") is True:
                yield finding(
                    _("{tensor}: output head is packed, but tie_word_embeddings is true", tensor=name),
                    at=Place("config.json", pointer=spec.at("tie_word_embeddings")),
                    advice=_("set tie_word_embeddings to false, if the head is meant to differ from the embedding"),
                )


def _head(quantization, name):
    key = quantization.reader.head_key
    if key and not quantization.raw.get(key):
        pointer = f"{quantization.pointer}/{key}"
        edit = SetJson(quantization.file, pointer, True, expect=quantization.raw.get(key, MISSING))
        yield finding(
            _("{tensor}: output head is packed, but lm_head is not true", tensor=name),
            at=Place(quantization.file, pointer=pointer),
            fix=Fix(_("set lm_head to true"), (edit,)),
            advice=_("set lm_head to true"),
        )


def bad():
    case = tiny_gptq(never_in("phi3", "opt", why="the example copies q_proj to lm_head"))
    case.tensors.pop("lm_head.weight", None)
    for tail in ("qweight", "qzeros", "scales", "g_idx"):
        source = f"model.layers.0.self_attn.q_proj.{tail}"
        name, part = f"lm_head.{tail}", case.tensors[source]
        if part.ndim == 2:  # as many outputs as the vocabulary has words
            part = np.resize(part.T, (part.shape[1] * case.spec.vocab // 64, part.shape[0])).T.copy()
        case.tensors[name], case.dtypes[name] = part, case.dtypes[source]
    return case, "lm_head.qweight: output head is packed, but lm_head is not true"


def good():
    return tiny_gptq()
