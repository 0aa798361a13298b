"""F057 unmerged-adapter: LoRA matrices are stored but not merged into the weights.

Why: readers of the base family drop lora_A and lora_B, and with them the fine-tuning. Where the weight itself is named
`base_layer.weight`, they find no weight at all.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- vLLM: `KeyError: 'model.layers.`

Do: load with PEFT, `merge_and_unload()`, save again.

False alarms: none known; models with low-rank linears of their own (DeepSeek) use other names.

Fix safety: safe where adapter_config.json is in the same directory, because it states the scale. Each weight becomes W
+ scale * B @ A, computed in float32 and rounded once (with use_dora, rescaled to the stored magnitudes), and gets its
plain name. adapter_config.json is left out, because transformers would load the base that it names. Else manual, as the
scale is not stated. An adapter without a model is F022.

Sources: huggingface/peft src/peft/tuners/lora/layer.py.
"""

import re

from doctor.lint.rule import (
    ADAPTER,
    AddLowRank,
    DropFile,
    DropTensor,
    Edit,
    Fix,
    NotMergeable,
    Place,
    RenameTensor,
    _,
    finding,
    pairs,
    plural,
    product,
    rule,
)
from doctor.lint.testing import tiny

LORA = re.compile(
    r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save)(\.|$)|^base_model\.model\."
)
# Every adapter has such names: all names are searched at once, since a large model has 50,000. The prefix alone is what
# a merged model keeps when it is saved from its wrapper (F061).
MARKS = ("lora_", "base_layer", "modules_to_save")


@rule("F057", "error", implied_by=("F022",))
def unmerged_adapter(checkpoint, tensors, json_files):
    text = "\n".join(tensors)
    found = sorted(n for n in tensors if LORA.search(n)) if any(mark in text for mark in MARKS) else []
    if found:
        info = tensors[found[0]]
        yield finding(
            plural(
                "{n:,} tensor belongs to an adapter that was not merged: {first}",
                "{n:,} tensors belong to an adapter that was not merged; the first is {first}",
                len(found),
                first=found[0],
            ),
            at=Place(info.shard, tensor=found[0]),
            evidence={"tensors": len(found)},
            fix=_merge(checkpoint, tensors, found),
        )


def _merge(checkpoint, tensors, found) -> Fix:
    """Fix that merges the matrices into their weights and removes the wrappers from the names."""
    config = checkpoint.value(ADAPTER)
    try:
        if config is None:
            raise NotMergeable(_("adapter_config.json, which states the scale, is missing"))
        edits: list[Edit] = []
        merged = pairs(config, tensors, found)
        matrices = {n for pair in merged for n in pair.names}
        plain = {
            n: n.removeprefix("base_model.model.").replace(".base_layer.", ".") for n in tensors if n not in matrices
        }
        weights = {to: n for n, to in plain.items()}
        for pair in merged:
            name = weights.get(f"{pair.module}.weight")
            if name is None or tensors[name].shape != product(pair, tensors):
                raise NotMergeable(
                    _(
                        "{module} has no weight of shape {shape}",
                        module=pair.module,
                        shape=list(product(pair, tensors)),
                    )
                )
            edits.append(
                AddLowRank(name, str(checkpoint.root), pair.a, pair.b, pair.scale, pair.transposed, pair.magnitude)
            )
        edits += [DropTensor(name) for name in sorted(matrices)]
        odd = next((to for to in plain.values() if LORA.search(to)), None)
        if odd is not None or not edits or len(weights) < len(plain):
            raise NotMergeable(_("{tensor} is not a LoRA matrix of a linear", tensor=odd or found[0]))
    except NotMergeable as error:
        title = _("merge the adapter with PEFT's merge_and_unload() and save again: {why}", why=error.args[0])
        return Fix(title, (), "manual")
    edits += [RenameTensor(n, to) for n, to in plain.items() if n != to]
    # transformers treats a directory that has this file as an adapter, and fetches its base instead
    edits.append(DropFile(ADAPTER))
    return Fix(_("merge the adapter into the weights beside it"), tuple(edits))


def bad():
    case = tiny()
    stem = case.name("down").removesuffix(".weight")
    extra = {f"{stem}.lora_A.weight": case.down()[:8].copy(), f"{stem}.lora_B.weight": case.down()[:, :8].copy()}
    case.tensors |= extra
    case.dtypes |= dict.fromkeys(extra, "BF16")
    return case, f"2 tensors belong to an adapter that was not merged; the first is {stem}.lora_A.weight"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case, _message = bad()
    weight = case.name("down")
    case.tensors[weight.replace(".weight", ".base_layer.weight")] = case.tensors.pop(weight)
    case.dtypes[weight.replace(".weight", ".base_layer.weight")] = "BF16"
    case.json[ADAPTER] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    yield case
