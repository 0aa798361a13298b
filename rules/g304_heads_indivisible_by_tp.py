"""G304 heads-indivisible-by-tp: attention heads cannot be shared out among the GPUs.

Why: tensor parallelism gives each GPU whole heads. Query heads must be a multiple of tp; key and value
heads too, or tp a multiple of them, because then they are repeated.

Seen as:
- vLLM: `must be divisible by tensor parallel size`

Do: choose a tp that divides both (the table lists those that do), or use pipeline parallelism.

False alarms: runtimes that split heads unevenly (ExLlamaV2 splits by layers and rows).

Fix safety: no fix: adding zero heads is exact, but key-value groups must be kept and few runtimes read the
result.

Sources: vllm-project/vllm vllm/config (verify_with_parallel_config); QwenLM/Qwen3 issue 578.
"""

from doctor.rule import Place, finding, rule
from doctor.testing import tiny

TPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)


@rule("G304", "error")
def heads_indivisible_by_tp(checkpoint, spec, recipe):
    heads, kv = spec.n_heads, spec.n_kv_heads
    if not heads or recipe.runtime in ("exllamav2", "llama.cpp") or _fits(heads, kv, recipe.tp):
        return
    if heads % recipe.tp:
        key, what = spec.key_for("num_attention_heads"), f"{heads} attention heads"
    else:
        key, what = spec.key_for("num_key_value_heads"), f"{kv} key-value heads"
    legal = [tp for tp in TPS if _fits(heads, kv, tp)]
    yield finding(
        f"{what} cannot be shared out among {recipe.tp} GPUs",
        at=Place("config.json", pointer=spec.at(key)),
        evidence={"heads": heads, "kv_heads": kv, "tp": recipe.tp},
        facts_table=(("tensor parallel that fits", *legal),),
        advice=f"--tp {max(t for t in legal if t <= recipe.tp)}",
    )


def _fits(heads, kv, tp):
    return heads % tp == 0 and (not kv or (kv % tp == 0 if kv >= tp else tp % kv == 0))


def bad():
    case = tiny("llama")
    case.recipe = case.recipe.with_field("tp", 8).with_field("group_size", -1)
    return case, "4 attention heads cannot be shared out among 8 GPUs"


def good():
    case = tiny("llama")
    case.recipe = case.recipe.with_field("tp", 4).with_field("group_size", -1)
    return case
