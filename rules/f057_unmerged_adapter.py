"""F057 unmerged-adapter: the weight files hold LoRA matrices beside the weights they change.

Why: readers of the base family drop lora_A and lora_B, and with them the fine-tuning; where the weight itself is called
`base_layer.weight`, they find no weight at all.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- vLLM: `KeyError: 'model.layers.`

Do: load with PEFT, `merge_and_unload()`, save again.

False alarms: none known; models with low-rank linears of their own (DeepSeek) use other names.

Fix safety: safe where adapter_config.json lies beside the weights: it gives the scale, each weight becomes W + scale *
B @ A, worked out in float32 and rounded once (with use_dora, brought to its magnitudes), and gets its plain name;
adapter_config.json is left out, because transformers would load the base that it names. Else manual, as the scale
stands nowhere. An adapter of its own is F022.

Sources: huggingface/peft src/peft/tuners/lora/layer.py.
"""

import re

from doctor.lint.rule import (
    ADAPTER,
    AddLowRank,
    DropFile,
    DropTensor,
    Fix,
    NotMergeable,
    Place,
    RenameTensor,
    finding,
    pairs,
    product,
    rule,
)
from doctor.lint.testing import tiny

LORA = re.compile(
    r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)(\.|$)|^base_model\.model\."
)
# What every such name holds: one look at all names, since a large model has 50,000.
MARKS = ("lora_", "base_layer", "modules_to_save", "base_model.model.")


@rule("F057", "error", implied_by=("F022",))
def unmerged_adapter(checkpoint, tensors, json_files):
    text = "\n".join(tensors)
    found = sorted(n for n in tensors if LORA.search(n)) if any(mark in text for mark in MARKS) else []
    if found:
        info = tensors[found[0]]
        noun = "tensor is" if len(found) == 1 else "tensors are"
        yield finding(
            f"{len(found):,} {noun} an adapter's that was not merged, the first is {found[0]}",
            at=Place(info.shard, tensor=found[0]),
            evidence={"tensors": len(found)},
            fix=_merge(checkpoint, tensors, found),
        )


def _merge(checkpoint, tensors, found):
    """Fix that puts the matrices into the weights beside them and takes the wrappers off the names."""
    config = checkpoint.value(ADAPTER)
    try:
        if config is None:
            raise NotMergeable("adapter_config.json, which holds the scale, is not there")
        edits, merged = [], pairs(config, tensors, found)
        matrices = {n for pair in merged for n in pair.names}
        plain = {
            n: n.removeprefix("base_model.model.").replace(".base_layer.", ".") for n in tensors if n not in matrices
        }
        weights = {to: n for n, to in plain.items()}
        for pair in merged:
            name = weights.get(f"{pair.module}.weight")
            if name is None or tensors[name].shape != product(pair, tensors):
                raise NotMergeable(f"{pair.module} has no weight {list(product(pair, tensors))} beside them")
            edits.append(
                AddLowRank(name, str(checkpoint.root), pair.a, pair.b, pair.scale, pair.transposed, pair.magnitude)
            )
        edits += [DropTensor(name) for name in sorted(matrices)]
        odd = next((to for to in plain.values() if LORA.search(to)), None)
        if odd is not None or not edits or len(weights) < len(plain):
            raise NotMergeable(f"{odd or found[0]} is no matrix of a linear's LoRA")
    except NotMergeable as error:
        return Fix(f"merge the adapter with PEFT's merge_and_unload() and save again: {error}", (), "manual")
    edits += [RenameTensor(n, to) for n, to in plain.items() if n != to]
    edits.append(
        DropFile(ADAPTER)
    )  # transformers takes a directory that has one for an adapter, and fetches its base instead
    return Fix("merge the adapter into the weights beside it", tuple(edits))


def bad():
    case = tiny()
    stem = case.name("down").removesuffix(".weight")
    extra = {f"{stem}.lora_A.weight": case.down()[:8].copy(), f"{stem}.lora_B.weight": case.down()[:, :8].copy()}
    case.tensors |= extra
    case.dtypes |= dict.fromkeys(extra, "BF16")
    return case, f"2 tensors are an adapter's that was not merged, the first is {stem}.lora_A.weight"


def good():
    return tiny()


def more():
    """Cases whose cures the example above does not show."""
    case, _ = bad()
    weight = case.name("down")
    case.tensors[weight.replace(".weight", ".base_layer.weight")] = case.tensors.pop(weight)
    case.dtypes[weight.replace(".weight", ".base_layer.weight")] = "BF16"
    case.json[ADAPTER] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    yield case
