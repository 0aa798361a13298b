"""F051 shape-against-config: a tensor's size is not what config.json says.

Why: readers build the model from config.json and cannot put the weights in. When every tensor agrees on another number,
config.json is wrong; when one tensor stands alone, that tensor is.

Seen as:
- transformers: `Trying to set a tensor of shape`
- transformers: `size mismatch for`
- transformers: `You set `ignore_mismatched_sizes` to `False``
- vLLM: `Attempted to load weight`
- PyTorch: `copying a param with shape torch.Size([13696, 5120]) from checkpoint, the shape in current model is`

Do: correct the key, or fetch the tensor's shard again. Qwen 1 states intermediate_size twice as large as its MLP: that
is known here.

False alarms: a family whose shapes this version's table gives wrongly.

Fix safety: safe where all tensors agree on one value of the key. A tensor that stands alone is taken from a base model
with `--from`, unsafe; else manual.

Sources: QwenLM/Qwen issue 585; transformers src/transformers/modeling_utils.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, finding, keys_of, rule, solve
from doctor.lint.testing import tiny

HEADS = {
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "n_head",
    "n_heads",
    "num_heads",
    "num_kv_heads",
    "kv_channels",
    "multi_query_group_num",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
}


@rule("F051", "error", implied_by=("C147", "C141", "C156", "F059"))
def shape_against_config(checkpoint, placement, config, base):
    spec = placement.spec
    wrong = [m for m in placement.misfits() if not HEADS & set(keys_of(m.expression))]
    whole = {}
    for misfit in wrong:
        keys = keys_of(misfit.expression)
        if len(keys) == 1 and keys[0] not in whole:
            whole[keys[0]] = _agreed(placement, keys[0])
    told = set()
    for misfit in wrong:
        keys = keys_of(misfit.expression)
        value = whole.get(keys[0]) if len(keys) == 1 else None
        if value is None:
            yield _one(misfit, base)
        elif keys[0] not in told:
            told.add(keys[0])
            yield _key(spec, config, keys[0], value, misfit, placement)


def _agreed(placement, key):
    """The one value of the key that fits every tensor that depends on it alone, None where they disagree."""
    values = {solve(e, key, placement.spec, info.shape[axis]) for info, axis, e in placement.users(key)}
    return values.pop() if len(values) == 1 else None


def _key(spec, config, key, value, misfit, placement):
    name = spec.key_for(key)
    stated = spec.config.get(name, spec.lookup(key))
    users = len(placement.users(key))
    noun = "tensor says" if users == 1 else "tensors say"
    info = misfit.info
    fix = Fix(
        f'set "{name}": {value}',
        (SetJson("config.json", _pointer(spec, config, name), value, spec.config.get(name, MISSING)),),
    )
    return finding(
        f"{name} is {stated} in config.json; {users:,} {noun} {value}, such as {info.name} {info.dtype.name} {list(info.shape)}",
        at=Place("config.json", pointer=_pointer(spec, config, name), note=f"{value} in the weights"),
        evidence={"stated": stated, "tensors": value},
        fix=fix,
    )


def _one(misfit, base):
    info = misfit.info
    fix = Fix("fetch this tensor's shard again, of the same revision as config.json", (), "manual")
    if misfit.axis is None:
        text = f"{info.name} has {misfit.have} axes {list(info.shape)}; the family's has {misfit.want}"
    else:
        want = list(info.shape)
        want[misfit.axis] = misfit.want
        text = f"{info.name} is {list(info.shape)}; config.json gives {want} ({misfit.expression} = {misfit.want})"
        edit = base.offer(info.name, info.dtype.name, tuple(want)) if base else None
        fix = Fix(f"take it from {base.text}", (edit,), "unsafe") if edit else fix
    return finding(
        text,
        at=Place(info.shard, tensor=info.name),
        evidence={"is": str(list(info.shape)), "axis": misfit.axis},
        fix=fix,
    )


def _pointer(spec, config, name):
    return (
        spec.at(name)
        if spec.text_key and name in config.get(spec.text_key, {})
        else f"/{name}"
        if name in config
        else spec.at(name)
    )


def bad():
    case = tiny()
    key = next(k for k in ("vocab_size", "padded_vocab_size") if k in case.config)
    case.config[key] = 128
    name = next(n for n in sorted(case.tensors) if "embed_tokens" in n)
    heads = 1 + any(n.startswith("lm_head") for n in case.tensors)
    verb = "tensors say" if heads == 2 else "tensor says"
    first = next((n for n in sorted(case.tensors) if n.startswith("lm_head")), name)
    return case, f"{key} is 128 in config.json; {heads} {verb} 96, such as {first} BF16 [96, 64]"


def good():
    return tiny()
