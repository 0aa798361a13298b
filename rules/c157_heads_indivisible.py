"""C157 heads-indivisible: query heads do not divide evenly among key heads, or hidden_size among query heads.

Why: each key head serves an equal number of query heads, and without a head_dim of its own a model's heads share
hidden_size evenly. Readers stop, or cut heads in the wrong places.

Seen as:
- transformers: `hidden_size must be divisible by num_heads`
- transformers: `The hidden size is not a multiple of the number of attention heads`

Do: correct the count, which the attention's weights show (C143).

False alarms: none known in families of the table.

Fix safety: safe where head_dim is stated, or one of the two counts alone can be right: the weights' rows then give the
other. Else manual.

Sources: transformers src/transformers/models/llama/configuration_llama.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, assume, finding, keys_of, rule
from doctor.lint.testing import never_in, tiny

COUNTS = ("num_attention_heads", "num_key_value_heads")
MOST_HEADS = 512


@rule("C157", "error", implied_by=("C156", "F051"))
def heads_indivisible(checkpoint, spec, placement):
    heads, kv = spec.n_heads, spec.n_kv_heads
    if spec.family is None or not heads:
        return
    key = spec.key_for("num_key_value_heads")
    if kv and heads % kv and not isinstance(spec.config.get(key), list):
        yield finding(
            f"{spec.key_for('num_attention_heads')} {heads} is no multiple of {kv} key heads: {heads} / {kv} is not whole",
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"heads": heads, "kv_heads": kv},
            fix=_fix(placement),
        )
    stated = any(
        spec.config.get(k) is not None for k in ("head_dim", "kv_channels", "attention_head_dim", "qk_rope_head_dim")
    )
    if not stated and spec.hidden and spec.hidden % heads and spec.hidden // heads == spec.head_dim:
        key = spec.key_for("num_attention_heads")
        yield finding(
            f"hidden_size {spec.hidden} cannot be cut into {heads} heads, and head_dim is not stated",
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"hidden": spec.hidden, "heads": heads},
            fix=_fix(placement),
        )


def _fix(placement):
    """Set the one count that alone makes the attention's rows come out whole; where several do, nothing here says
    which.
    """
    spec = placement.spec
    found = [
        (spec.key_for(key), n)
        for key in COUNTS
        for n in range(1, MOST_HEADS + 1)
        if n != spec.lookup(key) and _comes_out(placement, key, n)
    ]
    if len(found) != 1:
        return Fix("correct the count of heads", (), "manual")
    key, value = found[0]
    return Fix(f'set "{key}": {value}', (SetJson("config.json", spec.at(key), value, spec.config.get(key, MISSING)),))


def _comes_out(placement, key, value):
    lookup = assume(placement.spec, **{placement.spec.key_for(key): value})
    heads, kv, hidden = (lookup(k) for k in (*COUNTS, "hidden_size"))
    if (kv and heads % kv) or (hidden and hidden % heads and placement.spec.config.get("head_dim") is None):
        return False
    return not any({*COUNTS, "head_dim"} & set(keys_of(m.expression)) for m in placement.misfits(lookup))


def bad():
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_attention_heads"] = 5
    del case.config["head_dim"]
    return case, "num_attention_heads 5 is no multiple of 2 key heads: 5 / 2 is not whole"


def good():
    return tiny()


def more():
    """Cases whose cures the example above does not show."""
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_key_value_heads"] = 3
    yield case
