"""C143 heads-against-tensors: head counts and head_dim do not match the attention weights.

Why: heads times head_dim is the width of q, k, v and o. With another product the weights do not fit. The same product
with other heads cannot be detected from sizes.

Seen as:
- transformers: `size mismatch for model.layers.0.self_attn.k_proj.weight`
- PyTorch: `RuntimeError: shape '[1, 7, 9, 64]' is invalid for input of size 1344`

Do: correct the one key that makes all four sizes fit, if there is one.

False alarms: a kind of attention that this version does not know under a known model_type.

Fix safety: safe where exactly one key explains every tensor; else manual.

Sources: transformers src/transformers/models/llama/modeling_llama.py; Mistral-Nemo, whose head_dim is not hidden_size /
heads.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, assume, finding, keys_of, rule, solve
from doctor.lint.testing import never_in, tiny

KEYS = (
    "num_key_value_heads",
    "head_dim",
    "num_attention_heads",
    "num_kv_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "kv_channels",
    "multi_query_group_num",
    "v_head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
)


@rule("C143", "error", implied_by=("F051", "C147", "C141", "C156", "C157", "F059", "G330", "O620"))
def heads_against_tensors(checkpoint, placement, config):
    spec = placement.spec
    wrong = [m for m in placement.misfits() if m.axis is not None and set(KEYS) & set(keys_of(m.expression))]
    if not wrong:
        return
    first = wrong[0]
    solutions = list(_solutions(placement, first))
    info = first.info
    named = {
        "expression": first.expression,
        "want": first.want,
        "tensor": placement.label(info),
        "shape": list(info.shape),
        "have": first.have,
    }
    message = (
        _("config.json gives {expression} = {want}; {tensor} {shape} has {have} rows", **named)
        if first.axis == 0
        else _("config.json gives {expression} = {want}; {tensor} {shape} has {have} columns", **named)
    )
    if solutions:
        key, value = solutions[0]
        name = spec.key_for(key)
        pointer = spec.at(name)
        stated = spec.config.get(name, MISSING)
        yield finding(
            message,
            at=Place("config.json", pointer=pointer, note=_("{value} fits every tensor", value=value)),
            evidence={"tensors": len(wrong)},
            fix=Fix(
                _('set "{key}": {value}', key=name, value=value),
                (SetJson("config.json", pointer, value, stated),),
                "safe" if len(solutions) == 1 else "unsafe",
            ),
        )
    else:
        yield finding(
            message,
            at=Place(info.shard, tensor=placement.stored(info.name)),
            evidence={"tensors": len(wrong)},
            fix=Fix(_("take config.json and weights of one revision"), (), "manual"),
        )


def _solutions(placement, misfit):
    """Each (key, value) that alone makes every head size fit."""
    for key in keys_of(misfit.expression):
        if key not in KEYS:
            continue
        value = solve(misfit.expression, key, placement.spec, misfit.have)
        if value is not None and not any(
            set(KEYS) & set(keys_of(m.expression)) for m in placement.misfits(assume(placement.spec, **{key: value}))
        ):
            yield key, value


def bad():
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_key_value_heads"] = 4
    return (
        case,
        "config.json gives num_key_value_heads * head_dim = 64; model.layers.0.self_attn.k_proj.weight [32, 64] has 32 rows",
    )


def good():
    return tiny()
