"""C157 heads-indivisible: query heads do not divide evenly among key heads, or hidden_size among query heads.

Why: each key head serves an equal number of query heads, and without a head_dim of its own a model's heads share hidden_size evenly.
Readers stop, or cut heads in the wrong places.

Seen as:
- transformers: `hidden_size must be divisible by num_heads`
- transformers: `The hidden size is not a multiple of the number of attention heads`

Do: correct the count, which the attention's weights show (C143).

False alarms: none known in families of the table.

Fix safety: manual; C143 offers the count that fits the weights.

Sources: transformers src/transformers/models/llama/configuration_llama.py.

标题: 查询头不能平均分给键值头，或 hidden_size 不能平均分给查询头

原因: 每个键头服务同样多的查询头；没有单独写 head_dim 的模型，各头平分 hidden_size。不整除时读取程序会停下，或
在错误的位置切头。

处理: 改正头数，注意力权重能看出正确的值（C143）。

误报: 表中的系列暂无已知。

修复: 需手动；与权重相符的数由 C143 给出。
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import never_in, tiny


@rule("C157", "error", implied_by=("C156", "F051"))
def heads_indivisible(checkpoint, spec):
    heads, kv = spec.n_heads, spec.n_kv_heads
    manual = Fix("correct the count of heads", (), "manual")
    if spec.family is None or not heads:
        return
    key = spec.key_for("num_key_value_heads")
    if kv and heads % kv and not isinstance(spec.config.get(key), list):
        yield finding(f"{spec.key_for('num_attention_heads')} {heads} is no multiple of {kv} key heads: {heads} / {kv} is not whole",
                      at=Place("config.json", pointer=spec.at(key)), evidence={"heads": heads, "kv_heads": kv}, fix=manual)
    stated = any(spec.config.get(k) is not None for k in ("head_dim", "kv_channels", "attention_head_dim", "qk_rope_head_dim"))
    if not stated and spec.hidden and spec.hidden % heads and spec.hidden // heads == spec.head_dim:
        key = spec.key_for("num_attention_heads")
        yield finding(f"hidden_size {spec.hidden} cannot be cut into {heads} heads, and head_dim is not stated",
                      at=Place("config.json", pointer=spec.at(key)), evidence={"hidden": spec.hidden, "heads": heads}, fix=manual)


def bad():
    case = tiny(never_in("opt", why="every query head has a key head of its own"))
    case.config["num_attention_heads"] = 5
    del case.config["head_dim"]
    return case, "num_attention_heads 5 is no multiple of 2 key heads: 5 / 2 is not whole"


def good():
    return tiny()
