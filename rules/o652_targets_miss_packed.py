"""O652 targets-miss-packed: packed modules are no target of quantization_config, or a pattern is broken.

Why: readers build a quantized linear for the modules that quantization_config targets, and a plain one for all others.
Packed tensors of a module that nothing targets have no parameter to go to. A class as target, such as Linear, takes no
embedding. A pattern that is no regular expression stops the reader before it has read a tensor.

Seen as:
- vLLM: `KeyError: 'layers.0.mlp.down_proj.weight_packed'`
- vLLM: `KeyError: 'embed_tokens.weight_packed'`
- transformers: `re.error: nothing to repeat`

Do: write targets, ignore and dynamic so that they name what is packed: in compressed-tensors a name in full, or a
regular expression after "re:"; a shell pattern is none.

False alarms: none known.

Fix safety: no fix: what was meant is not in the files.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/compressed_tensors/utils.py (find_matched_target) and
utils/gptq_utils.py (is_layer_gptq_quantized), issue 31623; vllm-project/compressed-tensors
src/compressed_tensors/utils/match.py; vllm-project/llm-compressor issue 1241.
"""

import re

from doctor.lint.rule import KNOWN, LOST_DATA, Place, _, finding, plural, rule, word_tails
from doctor.lint.testing import tiny_packed

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings?)$")


@rule("O652", "error", implied_by=(*LOST_DATA, "O620", "O651", "F075"))
def targets_miss_packed(checkpoint, quantization_block, tensors, stored_weights):
    form = quantization_block and next((f for f in KNOWN.values() if f.claims(quantization_block[0])), None)
    if not form:
        return
    raw, file, pointer = quantization_block
    targets = form.targets(raw)
    broken = [entry for entry in (*targets, *form.exclusions(raw)) if entry.broken]
    for entry in broken:
        yield finding(
            _("{entry!r} is no regular expression: readers stop at it", entry=entry.entry),
            at=Place(file, pointer=pointer + entry.pointer),
            evidence={"entry": entry.entry},
            advice=_("write a name in full, or a regular expression"),
        )
    takes, excluded = form.takes(raw), form.excluded(raw)
    if broken or takes is None:
        return
    packed = {name.rpartition(".")[0]: name for name in tensors if name.endswith(word_tails())}
    packed |= {weight.module: name for name, weight in stored_weights.items()}
    missed = [
        module
        for module in packed
        if not excluded(module) and (not takes(module) or (EMBEDDING.search(module) and not _named(module, targets)))
    ]
    if missed:
        yield finding(
            plural(
                "{n:,} module is packed, and no target of quantization_config takes it ({first})",
                "{n:,} modules are packed, and no target of quantization_config takes them (first {first})",
                len(missed),
                first=missed[0],
            ),
            at=Place(tensors[packed[missed[0]]].shard, tensor=packed[missed[0]]),
            evidence={"modules": missed[:100], "targets": [entry.entry for entry in targets][:100]},
            facts_table=((_("targets"), *(entry.entry for entry in targets[:4])),) if targets else (),
            advice=_("make the targets name what is packed"),
        )


def _named(module, targets):
    """Whether an embedding is a target by its own name, or by its class; in formats without targets it is one."""
    return not targets or any(t.matches(module) or t.entry == "Embedding" for t in targets)


def bad():
    case = tiny_packed(targets=["re:.*layers\\.0\\..*"])
    first = next(n.rpartition(".")[0] for n in sorted(case.tensors) if ".1." in n and n.endswith("weight_packed"))
    count = sum(".1." in n and n.endswith("weight_packed") for n in case.tensors)
    return case, f"{count} modules are packed, and no target of quantization_config takes them (first {first})"


def good():
    return tiny_packed()
