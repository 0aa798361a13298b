"""C157 heads-indivisible: query heads not divisible by kv heads, or hidden_size by query heads.

Why: each key/value head serves an equal number of query heads, and without a head_dim the heads share hidden_size
evenly. Readers stop, or split heads in the wrong places.

Seen as:
- transformers: `hidden_size must be divisible by num_heads`
- transformers: `The hidden size is not a multiple of the number of attention heads`

Do: correct the count; the attention weights show the right one (C143).

False alarms: none known in families of the table.

Fix safety: safe where head_dim is stated, or where only one of the two counts can be right: the rows of the weights
then give it. Else manual.

Sources: transformers src/transformers/models/llama/configuration_llama.py.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, assume, finding, keys_of, rule
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
            _(
                "{key} {heads} is not divisible by {kv} key/value heads",
                key=spec.key_for("num_attention_heads"),
                heads=heads,
                kv=kv,
            ),
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
            _(
                "hidden_size {hidden} is not divisible by {heads} heads, and head_dim is not stated",
                hidden=spec.hidden,
                heads=heads,
            ),
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"hidden": spec.hidden, "heads": heads},
            fix=_fix(placement),
        )


def _fix(placement):
    """Set the one count that alone makes the attention's rows fit; where several do, nothing shows which is right."""
    spec = placement.spec
    found = [
        (spec.key_for(key), n)
        for key in COUNTS
        for n in range(1, MOST_HEADS + 1)
        if n != spec.lookup(key) and _fits(placement, key, n)
    ]
    if len(found) != 1:
        return Fix(_("correct the count of heads"), (), "manual")
    key, value = found[0]
    edit = SetJson("config.json", spec.at(key), value, spec.config.get(key, MISSING))
    return Fix(_('set "{key}": {value}', key=key, value=value), (edit,))


def _fits(placement, key, value):
    lookup = assume(placement.spec, **{placement.spec.key_for(key): value})
    heads, kv, hidden = (lookup(k) for k in (*COUNTS, "hidden_size"))
    if (kv and heads % kv) or (hidden and hidden % heads and placement.spec.config.get("head_dim") is None):
        return False
    return not any({*COUNTS, "head_dim"} & set(keys_of(m.expression)) for m in placement.misfits(lookup))


def bad():
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_attention_heads"] = 5
    del case.config["head_dim"]
    return case, "num_attention_heads 5 is not divisible by 2 key/value heads"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_key_value_heads"] = 3
    yield case
