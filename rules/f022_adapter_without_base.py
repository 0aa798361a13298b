"""F022 adapter-without-base: the directory holds a LoRA adapter, not a model.

Why: an adapter is a small change to another model's weights. Alone it cannot be quantized or run.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- AutoGPTQ: `does not appear to have a file named config.json`

Do: merge it into its base model: `doctor fix ADAPTER -o OUT --from BASE`, or `model.merge_and_unload()` of PEFT. W +
scale * B @ A is worked out in float32 and rounded once to the base's type; scale is lora_alpha / r, with use_rslora
lora_alpha / sqrt(r). With use_dora each output's row of that sum is brought to the magnitude that the adapter holds for
it.

False alarms: a full model that keeps its adapter beside it is not counted.

Fix safety: safe with `--from`, if every matrix of the adapter finds its weight there; else manual. Ranks and alphas by
pattern and modules that were trained whole are part of it. What is more than LoRA and DoRA (trained biases, other kinds
of adapter, any key that doctor does not know) is left to PEFT, and so is an adapter whose training began by taking a
part out of the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), to which W + scale * B @ A would add that part twice. The
finding says which it was.

Sources: huggingface/peft docs, "Model merging".
"""

import json

from doctor.lint.rule import (
    ADAPTER,
    WORDS,
    AddLowRank,
    CastTensor,
    Fix,
    NotMergeable,
    Place,
    Rebase,
    TakeTensor,
    finding,
    pairs,
    product,
    rule,
    saved_whole,
)
from doctor.lint.testing import shard_bytes, tiny


@rule("F022", "error")
def adapter_without_base(checkpoint, files, json_files, base, every_digests=None):
    if ADAPTER not in files or any(n.endswith(".safetensors") and not n.startswith("adapter_model") for n in files):
        return
    value = checkpoint.value(ADAPTER) or {}
    named = value.get("base_model_name_or_path")
    of = f" of {named}" if isinstance(named, str) and named else ""
    edits, why = (
        _merge(checkpoint, value, base, every_digests or {})
        if base is not None
        else ((), _refused(value, checkpoint.tensors))
    )
    manual = (
        f"merge it with PEFT's merge_and_unload(): {why}"
        if why
        else f"name the model to merge it into with --from{of and ', as ' + named}"
    )
    fix = (
        Fix(
            f"merge it into {base.text}: {len(edits) - 1:,} {'weight changes' if len(edits) == 2 else 'weights change'}",
            edits,
        )
        if edits
        else Fix(manual, (), "manual")
    )
    yield finding(
        f"a {value.get('peft_type', 'PEFT')} adapter{of}, without the model it changes",
        at=Place(ADAPTER, pointer="/base_model_name_or_path"),
        evidence={"base": str(named)},
        fix=fix,
    )


def _refused(config, own):
    """Why no base would do; "" where one may."""
    try:
        pairs(config, own, own)
        return ""
    except NotMergeable as error:
        return str(error)


def _merge(checkpoint, config, donor, digests):
    """(edits, "") that make the base with the adapter in it, or ((), why doctor does not)."""
    base, edits, own = donor.checkpoint.tensors, [Rebase(donor.root)], checkpoint.tensors
    try:
        if not own:
            raise NotMergeable("its tensors are in no safetensors file")
        merged = pairs(config, own, own)
        for pair in merged:
            weight = base.get(f"{pair.module}.weight")
            if any(f"{pair.module}.{words}" in base for words in WORDS.values()):
                raise NotMergeable(f"{pair.module} is packed in the base, whose 16-bit original is wanted")
            if weight is None:
                raise NotMergeable(f"{pair.module} lacks its weight in the base")
            if weight.shape != product(pair, own):
                raise NotMergeable(
                    f"{pair.module} is {list(weight.shape)} in the base; B times A is {list(product(pair, own))}"
                )
            edits.append(
                AddLowRank(
                    weight.name, str(checkpoint.root), pair.a, pair.b, pair.scale, pair.transposed, pair.magnitude
                )
            )
        rest = sorted(own.keys() - {n for pair in merged for n in pair.names})
        for saved in saved_whole(config):
            if not any(f".{saved}." in n for n in rest):
                raise NotMergeable(f"modules_to_save names {saved}, of which no tensor is there")
        for name in rest:
            edits += _saved(checkpoint, config, own[name], donor, digests)
    except NotMergeable as error:
        return (), str(error)
    return (tuple(edits), "") if len(edits) > 1 else ((), "the adapter has no tensor")


def _saved(checkpoint, config, info, donor, digests):
    """A module that was trained whole (modules_to_save) in the place of the base's."""
    base, name = donor.checkpoint.tensors, info.name.removeprefix("base_model.model.")
    module = name.rpartition(".")[0]
    if not any(module == saved or module.endswith(f".{saved}") for saved in saved_whole(config)):
        raise NotMergeable(f"{info.name} is no matrix of a linear's LoRA")
    if name not in base or base[name].shape != info.shape:
        raise NotMergeable(
            f"{info.name} is {list(info.shape)}, and the base has {list(base[name].shape) if name in base else 'no such tensor'}"
        )
    if donor.is_tied(name):
        raise NotMergeable(f"{info.name} was trained apart from the head, and the base has one matrix for both")
    if info.name not in digests:
        raise NotMergeable(f"{info.name} was not read")
    yield TakeTensor(name, str(checkpoint.root), digests[info.name][info.shard], info.name)
    if info.dtype.name != base[name].dtype.name:
        yield CastTensor(name, base[name].dtype.name)


def bad():
    case = tiny()
    name = "base_model.model." + case.name("down").removesuffix(".weight")
    parts = {
        f"{name}.lora_A.weight": case.tensors[case.name("down")][:8],
        f"{name}.lora_B.weight": case.tensors[case.name("down")][:, :8],
    }
    case.files["adapter_model.safetensors"] = shard_bytes(parts, dict.fromkeys(parts, "BF16"))
    case.files[ADAPTER] = json.dumps(
        {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16}
    ).encode()
    case.damage.append(lambda folder: [(folder / n).unlink() for n in ("model.safetensors", "config.json")])
    return case, "a LORA adapter of org/base, without the model it changes"


def good():
    return tiny()
