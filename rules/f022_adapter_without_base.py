"""F022 adapter-without-base: is a LoRA adapter without its base model.

Why: an adapter is a small change to another model's weights. Alone it cannot be quantized or run.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- AutoGPTQ: `does not appear to have a file named config.json`

Do: merge it into its base model: `doctor fix ADAPTER -o OUT --from BASE`, or `model.merge_and_unload()` of PEFT. W +
scale * B @ A is computed in float32 and rounded once to the base's dtype; scale is lora_alpha / r, with use_rslora
lora_alpha / sqrt(r). With use_dora each output row of that sum is rescaled to the magnitude that the adapter stores for
it.

False alarms: a full model that keeps its adapter in the same directory is not counted.

Fix safety: safe with `--from` if every matrix of the adapter has its weight in the base; else manual. Ranks and alphas
by pattern are read, and modules that were trained whole are copied. PEFT must merge what is more than LoRA and DoRA
(trained biases, other kinds of adapter, any key that doctor does not know). The same holds for an adapter whose
training started by subtracting a part of the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA): W + scale * B @ A would add
that part twice. The finding states which case it was.

Sources: huggingface/peft docs, "Model merging".
"""

import json

from doctor.lint.rule import (
    ADAPTER,
    AddLowRank,
    CastTensor,
    Edit,
    Fix,
    NotMergeable,
    Place,
    Rebase,
    TakeTensor,
    _,
    finding,
    pairs,
    plural,
    product,
    rule,
    saved_whole,
    word_tails,
)
from doctor.lint.testing import shard_bytes, tiny


@rule("F022", "error")
def adapter_without_base(checkpoint, files, json_files, base, every_digests=None):
    if ADAPTER not in files or any(n.endswith(".safetensors") and not n.startswith("adapter_model") for n in files):
        return
    value = checkpoint.value(ADAPTER) or {}
    named = value.get("base_model_name_or_path")
    of = named if isinstance(named, str) else ""
    kind = value.get("peft_type", "PEFT")
    yield finding(
        _("a {kind} adapter of {base}, without its base model", kind=kind, base=of)
        if of
        else _("a {kind} adapter without its base model", kind=kind),
        at=Place(ADAPTER, pointer="/base_model_name_or_path"),
        evidence={"base": str(named)},
        fix=_fix(checkpoint, value, of, base, every_digests or {}),
    )


def _fix(checkpoint, config, named, base, digests) -> Fix:
    """Merge the adapter into what --from names, or tell the user how. named: the base that the adapter states, or ""."""
    edits: tuple[Edit, ...] = ()
    if base is None:
        why = _refused(config, checkpoint.tensors)
    else:
        edits, why = _merge(checkpoint, config, base, digests)
    if edits:
        title = plural(
            "merge it into {base}: {n:,} weight changes",
            "merge it into {base}: {n:,} weights change",
            len(edits) - 1,
            base=base.text,
        )
        return Fix(title, edits)
    if why:
        return Fix(_("merge it with PEFT's merge_and_unload(): {why}", why=why), (), "manual")
    if named:
        return Fix(_("name the model to merge it into with --from, as {base}", base=named), (), "manual")
    return Fix(_("name the model to merge it into with --from"), (), "manual")


def _refused(config, own) -> str:
    """Why doctor cannot merge this adapter into any base; "" where it may."""
    try:
        pairs(config, own, own)
        return ""
    except NotMergeable as error:
        return error.args[0]


def _merge(checkpoint, config, donor, digests) -> tuple[tuple[Edit, ...], str]:
    """(edits, "") that merge the adapter into the base, or ((), why doctor does not)."""
    base, own = donor.checkpoint.tensors, checkpoint.tensors
    edits: list[Edit] = [Rebase(donor.root)]
    try:
        if not own:
            raise NotMergeable(_("its tensors are in no safetensors file"))
        merged = pairs(config, own, own)
        for pair in merged:
            weight = base.get(f"{pair.module}.weight")
            if any(pair.module + tail in base for tail in word_tails()):
                raise NotMergeable(
                    _("{module} is packed in the base; it must be the 16-bit original", module=pair.module)
                )
            if weight is None:
                raise NotMergeable(_("the base has no weight for {module}", module=pair.module))
            if weight.shape != product(pair, own):
                raise NotMergeable(
                    _(
                        "{module} is {shape} in the base; B @ A is {product}",
                        module=pair.module,
                        shape=list(weight.shape),
                        product=list(product(pair, own)),
                    )
                )
            edits.append(
                AddLowRank(
                    weight.name, str(checkpoint.root), pair.a, pair.b, pair.scale, pair.transposed, pair.magnitude
                )
            )
        rest = sorted(own.keys() - {n for pair in merged for n in pair.names})
        for saved in saved_whole(config):
            if not any(f".{saved}." in n for n in rest):
                raise NotMergeable(_("modules_to_save names {module}, but no tensor of it exists", module=saved))
        for name in rest:
            edits += _saved(checkpoint, config, own[name], donor, digests)
    except NotMergeable as error:
        return (), error.args[0]
    return (tuple(edits), "") if len(edits) > 1 else ((), _("the adapter has no tensor"))


def _saved(checkpoint, config, info, donor, digests):
    """Edits that replace a module of the base by the one that was trained whole (modules_to_save)."""
    base, name = donor.checkpoint.tensors, info.name.removeprefix("base_model.model.")
    module = name.rpartition(".")[0]
    if not any(module == saved or module.endswith(f".{saved}") for saved in saved_whole(config)):
        raise NotMergeable(_("{tensor} is not a LoRA matrix of a linear", tensor=info.name))
    if name not in base:
        raise NotMergeable(_("{tensor} has no counterpart in the base", tensor=info.name))
    if base[name].shape != info.shape:
        raise NotMergeable(
            _(
                "{tensor} is {shape}; in the base it is {base}",
                tensor=info.name,
                shape=list(info.shape),
                base=list(base[name].shape),
            )
        )
    if donor.is_tied(name):
        raise NotMergeable(
            _("{tensor} was trained separately; in the base, head and embedding share one matrix", tensor=info.name)
        )
    if info.name not in digests:
        raise NotMergeable(_("{tensor} was not read", tensor=info.name))
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
    return case, "a LORA adapter of org/base, without its base model"


def good():
    return tiny()
