"""F051 shape-against-config: tensor shape does not match config.json.

Why: readers build the model from config.json and cannot load the weights. When all tensors agree on another number,
config.json is wrong; when only one tensor differs, that tensor is wrong.

Seen as:
- transformers: `Trying to set a tensor of shape`
- transformers: `size mismatch for`
- transformers: `You set `ignore_mismatched_sizes` to `False``
- vLLM: `Attempted to load weight`
- PyTorch: `copying a param with shape torch.Size([13696, 5120]) from checkpoint, the shape in current model is`

Do: correct the key, or fetch the tensor's shard again. Qwen 1 states intermediate_size twice as large as its MLP;
doctor knows this.

False alarms: a family whose shapes are wrong in this version's table.

Fix safety: safe where all tensors agree on one value of the key. A single tensor that differs is taken from the donor
with `--from`, unsafe; else manual.

Sources: QwenLM/Qwen issue 585; transformers src/transformers/modeling_utils.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, keys_of, plural, rule, solve
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


@rule("F051", "error", implied_by=("C147", "C141", "C156", "F059", "F062", "G330", "O611", "O612", "O620", "O625"))
def shape_against_config(checkpoint, placement, config, base):
    spec = placement.spec
    wrong = [m for m in placement.misfits() if not HEADS & set(keys_of(m.expression))]
    whole = {}
    for misfit in wrong:
        keys = keys_of(misfit.expression)
        if len(keys) == 1 and keys[0] not in whole:
            whole[keys[0]] = _agreed(placement, keys[0])
    told = set()
    turned = _transposed(wrong)
    for misfit in turned:
        yield _turned(misfit, placement)
    wrong = [m for m in wrong if m.info.name not in {t.info.name for t in turned}]
    for misfit in wrong:
        keys = keys_of(misfit.expression)
        value = whole.get(keys[0]) if len(keys) == 1 else None
        if value is None:
            yield _one(misfit, base, placement)
        elif keys[0] not in told:
            told.add(keys[0])
            yield _key(spec, config, keys[0], value, misfit, placement)


def _agreed(placement, key):
    """The one value of the key that fits every tensor that depends on it alone, None where they disagree."""
    values = {solve(e, key, placement.spec, info.shape[axis]) for info, axis, e in placement.users(key)}
    return values.pop() if len(values) == 1 else None


def _transposed(misfits):
    """The first misfit of each matrix that has the right shape with its axes changed over."""
    wants: dict[str, dict[int, int]] = {}
    for misfit in misfits:
        if misfit.axis is not None and len(misfit.info.shape) == 2:
            wants.setdefault(misfit.info.name, {})[misfit.axis] = misfit.want
    turned = {name for name, want in wants.items() if len(want) == 2}
    return [m for m in misfits if m.axis == 0 and m.info.name in turned and _turns(m.info.shape, wants[m.info.name])]


def _turns(shape, want):
    return (want[0], want[1]) == (shape[1], shape[0])


def _turned(misfit, placement):
    info = misfit.info
    return finding(
        _(
            "{tensor} is {shape}, the transpose of the {want} that config.json gives",
            tensor=placement.label(info),
            shape=list(info.shape),
            want=list(info.shape[::-1]),
        ),
        at=Place(info.shard, tensor=placement.stored(info.name)),
        evidence={"is": str(list(info.shape))},
        fix=Fix(_("save it as [out_features, in_features], as the class stores it"), (), "manual"),
    )


def _key(spec, config, key, value, misfit, placement):
    name = spec.key_for(key)
    stated = spec.config.get(name, spec.lookup(key))
    users = len(placement.users(key))
    info = misfit.info
    fix = Fix(
        _('set "{key}": {value}', key=name, value=value),
        (SetJson("config.json", _pointer(spec, config, name), value, spec.config.get(name, MISSING)),),
    )
    return finding(
        plural(
            "{key} is {stated} in config.json; {n:,} tensor implies {value}: {tensor} {dtype} {shape}",
            "{key} is {stated} in config.json; {n:,} tensors imply {value}, such as {tensor} {dtype} {shape}",
            users,
            key=name,
            stated=stated,
            value=value,
            tensor=placement.label(info),
            dtype=_("packed") if info.name in placement.words else info.dtype.name,
            shape=list(info.shape),
        ),
        at=Place("config.json", pointer=_pointer(spec, config, name), note=_("{value} in the weights", value=value)),
        evidence={"stated": stated, "tensors": value},
        fix=fix,
    )


def _one(misfit, base, placement):
    info = misfit.info
    named, stored = placement.label(info), placement.stored(info.name)
    fix = Fix(_("fetch this tensor's shard again, of the same revision as config.json"), (), "manual")
    if misfit.axis is None:
        text = _(
            "{tensor} has {have} dimensions {shape}; the family's model has {want}",
            tensor=named,
            have=misfit.have,
            shape=list(info.shape),
            want=misfit.want,
        )
    else:
        want = list(info.shape)
        want[misfit.axis] = misfit.want
        text = _(
            "{tensor} is {shape}; config.json gives {want} ({expression} = {size})",
            tensor=named,
            shape=list(info.shape),
            want=want,
            expression=misfit.expression,
            size=misfit.want,
        )
        edit = base.offer(info.name, info.dtype.name, tuple(want)) if base and named == info.name else None
        fix = Fix(_("take it from {base}", base=base.text), (edit,), "unsafe") if edit else fix
    return finding(
        text,
        at=Place(info.shard, tensor=stored),
        evidence={"is": str(list(info.shape)), "axis": misfit.axis},
        fix=fix,
    )


def _pointer(spec, config, name):
    return (
        spec.at(name)
        if spec.text_key and name in spec.section(config)
        else f"/{name}"
        if name in config
        else spec.at(name)
    )


def bad():
    case = tiny()
    key = next(k for k in ("vocab_size", "padded_vocab_size") if k in case.config)
    case.config[key] = 128
    name = next(n for n in sorted(case.tensors) if "embed_tokens" in n)
    head = next((n for n in sorted(case.tensors) if n.startswith("lm_head")), None)
    what = f"1 tensor implies 96: {name}" if head is None else f"2 tensors imply 96, such as {head}"
    return case, f"{key} is 128 in config.json; {what} BF16 [96, 64]"


def good():
    return tiny()
