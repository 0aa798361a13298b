"""G304 heads-indivisible-by-tp: attention heads are not divisible by the tensor-parallel size.

Why: tensor parallelism gives each GPU whole heads. The number of query heads must be a multiple of tp. The number of
key and value heads must be too, or tp must be a multiple of it, because then these heads are repeated.

Seen as:
- vLLM: `must be divisible by tensor parallel size`
- vLLM: `assert self.total_num_heads % tp_size == 0`
- TGI: ```num_heads` must be divisible by `num_shards```
- Qwen: `heads (64) must be divisible by TP`

Do: choose a tp that divides both (the table lists those that do), or use pipeline parallelism. `--unsafe-fixes=G304`
adds heads of zeros.

False alarms: runtimes that split heads unevenly (ExLlamaV2 splits by layers and rows).

Fix safety: unsafe, and only by name: shapes change, and head_dim must be read from config.json (the families that do so
are listed). Outputs do not change in exact arithmetic: the output of a zero head is multiplied by zero columns of o.
New query heads go to the end of each key-value group, so that every old head keeps its keys; or whole groups are added
at the end. Offered where the new number of heads divides hidden_size, which transformers requires.

Sources: vllm-project/vllm vllm/config (verify_with_parallel_config); QwenLM/Qwen3 issue 578.
"""

from doctor.lint.rule import MISSING, Fix, PadTensor, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny

READ_HEAD_DIM = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
MOST = 2  # times as many heads at most: beyond, another plan is cheaper
TPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)


@rule("G304", "error")
def heads_indivisible_by_tp(checkpoint, spec, recipe, tensors):
    heads, kv = spec.n_heads, spec.n_kv_heads
    if not heads or recipe.runtime in ("exllamav2", "llama.cpp") or _fits(heads, kv, recipe.tp):
        return
    if heads % recipe.tp:
        key = spec.key_for("num_attention_heads")
        message = _("{n} attention heads are not divisible by {tp} GPUs", n=heads, tp=recipe.tp)
    else:
        key = spec.key_for("num_key_value_heads")
        message = _("{n} key-value heads cannot be distributed over {tp} GPUs", n=kv, tp=recipe.tp)
    legal = [tp for tp in TPS if _fits(heads, kv, tp)]
    yield finding(
        message,
        at=Place("config.json", pointer=spec.at(key)),
        evidence={"heads": heads, "kv_heads": kv, "tp": recipe.tp},
        facts_table=((_("tensor parallel that fits"), *legal),),
        advice=_("--tp {n}", n=max(t for t in legal if t <= recipe.tp)),
        fix=_zero_heads(checkpoint, spec, tensors, recipe.tp),
    )


def _zero_heads(checkpoint, spec, tensors, tp):
    """Zero heads inside each key-value group, else whole groups of them; None where no exact padding is known."""
    heads, hidden = spec.n_heads, spec.hidden
    kv = spec.n_kv_heads or heads
    width = spec.head_dim or (hidden // heads if hidden and hidden % heads == 0 else None)
    if spec.family not in READ_HEAD_DIM or not width or not hidden or heads % kv:
        return None
    share = heads // kv
    sizes = [(kv, m) for m in range(share, MOST * share + 1)] if share > 1 else []
    sizes += [(n, share) for n in range(kv + 1, MOST * kv + 1)]
    new_kv, new_share = next(((n, m) for n, m in sizes if _fits(n * m, n, tp) and hidden % (n * m) == 0), (0, 0))
    edits = _pads(spec, tensors, width, (kv, share), (new_kv, new_share)) if new_kv else ()
    if not edits:
        return None
    config = spec.section(checkpoint.value("config.json"))
    wanted = {spec.key_for("num_attention_heads"): new_kv * new_share, "head_dim": width}
    if new_kv != kv and spec.key_for("num_key_value_heads") in config:
        wanted[spec.key_for("num_key_value_heads")] = new_kv
    keys = [
        SetJson("config.json", spec.at(k), v, config.get(k, MISSING))
        for k, v in wanted.items()
        if config.get(k, MISSING) != v
    ]
    values = {"old": heads, "new": new_kv * new_share}
    title = (
        _(
            "add heads of zeros: {old} -> {new} ({n} more in each of {groups} groups; same outputs in exact arithmetic)",
            n=new_share - share,
            groups=kv,
            **values,
        )
        if new_kv == kv
        else _(
            "add heads of zeros: {old} -> {new} ({n} groups more; same outputs in exact arithmetic)",
            n=new_kv - kv,
            **values,
        )
    )
    return Fix(
        title,
        (*edits, *keys),
        "unsafe",
        by_name=True,
        needs=("W201",),
    )


def _pads(spec, tensors, width, old, new):
    (kv, share), (new_kv, new_share) = old, new
    blocks = kv if new_kv == kv else 1
    edits = []
    for linear in spec.linears:
        role = linear.role
        if role not in ("q", "k", "v", "o"):
            if ".self_attn." in linear.tensor:
                return ()
            continue
        axis = 1 if role == "o" else 0
        groups, size = (share, new_share) if role in "qo" else (1, 1)
        if tensors[linear.tensor].shape[axis] != kv * groups * width:
            return ()
        if (new_kv, size) == (kv, groups):
            continue
        bias = f"{linear.name}.bias"
        for name in (linear.tensor, *([bias] if axis == 0 and bias in tensors else [])):
            edits.append(PadTensor(name, axis, new_kv * size * width, blocks, spread=False))
    norms = [i for n, i in tensors.items() if ".self_attn." in n and "norm" in n and i.shape != (width,)]
    return () if norms or any("sinks" in n for n in tensors) else tuple(edits)


def _fits(heads, kv, tp):
    return heads % tp == 0 and (not kv or (kv % tp == 0 if kv >= tp else tp % kv == 0))


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("tp", 8).with_field("group_size", -1)
    return case, "4 attention heads are not divisible by 8 GPUs"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("tp", 4).with_field("group_size", -1)
    return case
