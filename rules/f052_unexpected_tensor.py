"""F052 unexpected-tensor: tensor does not belong to this model family.

Why: readers drop it silently or with one line, so the model that runs is not the one that was trained. Often the model
is of another family than config.json states, or a tool changed it.

Seen as:
- transformers: `Some weights of the model checkpoint at`
- vLLM: `There is no module or parameter named`

Do: compare architectures and model_type in config.json with the source of the weights.

False alarms: variants of a family that add tensors and are newer than this version. Buffers that readers recompute
(rotary frequencies, causal masks), stored cache scales and the scales of packed weights are not counted. F066 judges
biases of linears. Outside of the
decoder layers only the family's own text class is judged: a multimodal class has towers of its own.

Fix safety: unsafe, and only by name: the tensor is dropped. Only you know whether the tensor or the config is right.
Manual while the model lacks a tensor: this one may be it under another name.

Sources: transformers src/transformers/modeling_utils.py, `_keys_to_ignore_on_load_unexpected`.
"""

import re

from doctor.lint.rule import (
    BUFFERS,
    DropTensor,
    Fix,
    Place,
    _,
    family_table,
    finding,
    packed_tails,
    plural,
    rule,
    undoes_packing,
)
from doctor.lint.testing import tiny

# Beside buffers: scales of a key-value cache and of packed weights, and what variants of a family add.
BENIGN = re.compile(
    BUFFERS.pattern + r"|[kv]_scale|[kv]_proj\.output_scale|weight_scale|input_scale|"
    r"(q|k|query|key)_?(layer)?norm|sinks|score|mtp|nextn|eh_proj|enorm|hnorm|shared_head"
)
BIAS_KEYS = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "use_qkv_bias", "bias", "attention_out_bias")

LOST = Fix(_("find out which missing tensor this is; nothing is dropped while the model lacks one"), (), "manual")


@rule(
    "F052",
    "warning",
    certainty="likely",
    implied_by=("C147", "F057", "F058", "F061", "F062", "F064", "C142", "F050", "G330", "O611", "O619", "O620", "O625"),
)
def unexpected_tensor(checkpoint, placement, config, misnamed, layout=None):
    spec = placement.spec
    if spec.family is None:
        return
    lost = bool(misnamed.absent or misnamed.names or placement.missing())
    placed = {info.name for info, _axis, _sizes in placement.sizes()} | _packed_experts(layout)
    for block in placement.counted:
        for tail, info in placement.blocks[block].items():
            if info.name in placed or BENIGN.search(tail):
                continue
            if tail.endswith("bias") or undoes_packing(tail):  # without its scales a packed weight is lost
                continue
            yield finding(
                _("{tensor} does not belong to a {family} model", tensor=info.name, family=spec.family),
                at=Place(info.shard, tensor=info.name),
                evidence={"family": spec.family},
                fix=LOST if lost else Fix(_("drop it"), (DropTensor(info.name),), "unsafe", by_name=True),
                advice=_("make sure that config.json names the family of these weights"),
            )
    for parent, own in _strangers(placement, config, checkpoint.tensors, placed).items():
        yield finding(
            plural(
                "{n:,} tensor under {parent} does not belong to a {family} model: {first}",
                "{n:,} tensors under {parent} do not belong to a {family} model; the first is {first}",
                len(own),
                parent=parent,
                family=spec.family,
                first=own[0].name,
            ),
            at=Place(own[0].shard, tensor=own[0].name),
            evidence={"family": spec.family, "tensors": len(own)},
            fix=LOST if lost else Fix(_("drop it"), tuple(DropTensor(i.name) for i in own), "unsafe", by_name=True),
            advice=_("make sure that config.json names the family of these weights"),
        )


def _packed_experts(layout):
    """Weights of experts that a format stores one by one, where the family's own files hold them in one tensor."""
    if layout is None or not layout.quantized:
        return set()
    return {f"{x.name}.weight" for x in layout.linears if x.expert is not None}


def _strangers(placement, config, tensors, placed):
    """Tensors outside of the decoder layers whose names the family's own text class does not have, by what stands
    before their first dot. `placed`: the names that have a template, of those outside and not foreign.
    """
    spec = placement.spec
    if spec.text_key or config.get("auto_map") or family_table(spec.family)["architecture"] != spec.architecture:
        return {}
    tails = packed_tails()
    found: dict[str, list] = {}
    named = (name for name in placement.foreign if placement.template_of(name))
    passed = {*placed, *placement.words, *named}
    for name, info in (*placement.outside.items(), *placement.foreign.items()):
        if name in passed or name not in tensors or name.endswith(tails):
            continue
        if name.endswith("bias") and placement.template_of(name.removesuffix(".bias") + ".weight"):
            continue
        if not (undoes_packing(name) or BENIGN.search(name)):
            found.setdefault(name.partition(".")[0] + ".", []).append(info)
    return found


def bad():
    case = tiny()
    for block in (1, 0):
        source = case.name("o", block)
        name = source.replace(".weight", "_2.weight")
        case.tensors[name], case.dtypes[name] = case.tensors[source][::-1], "BF16"
    return case, f"{name} does not belong to a {case.family} model"


def good():
    return tiny()
