"""K504 fp8-cache-key-bias: key bias is too large for an FP8 KV cache.

Why: e4m3 keeps four significant bits, so a value of 200 moves by up to 7 when it is stored. A key bias of that size is
the same for every token and tells attention nothing, yet its rounding changes with every position, because rotary
embedding turns it, and it exceeds the signal of the other channels. A scale does not help: it moves the range, not the
number of digits. Qwen2 and Qwen2.5 answer in garbage under an FP8 cache for this reason.

Seen as:
- vLLM: a Qwen2.5 that repeats `!!!!!!!!` under `--kv-cache-dtype fp8`

Do: quantize without --kv-cache, and leave vLLM's cache dtype on auto. The weights are fine to quantize.

False alarms: a large bias in a channel whose signal is large too; `doctor kvcache --measure` tells.

Fix safety: no fix: without scales the cache is another plan than the one that you asked for.

Sources: QwenLM/Qwen3 issue 840; vllm-project/vllm PR 11906; rules/k501_key_bias.py for the measured limits of four bits,
which is what e4m3 leaves a value of this size.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import encode, only_in, tiny


@rule("K504", "error")
def fp8_cache_key_bias(tensor, absmax, key_bits, recipe, goal):
    if goal != "quantize" or not recipe.kv_cache or key_bits in (None, 4):
        return
    yield finding(
        _(
            "{tensor} reaches {absmax:.0f}: an FP8 KV cache rounds keys of this size by up to {step:.0f}",
            tensor=tensor.name,
            absmax=absmax,
            step=absmax / 28,
        ),
        evidence={"absmax": absmax},
        advice=_("quantize without --kv-cache; the weights can be quantized"),
    )


def _case():
    case = tiny(only_in("qwen2", "qwen2_moe", "opt", why="its keys have no bias"))
    recipe = case.recipe.with_field("goal", "quantize").with_field("format", "compressed-tensors")
    case.recipe = recipe.with_field("kv_cache", "fp8")
    return case


def bad():
    case = _case()
    name = case.name("k").replace(".weight", ".bias")
    case.tensors[name][5] = encode([214.0], "BF16")[0]
    return case, f"{name} reaches 214: an FP8 KV cache rounds keys of this size by up to 8"


def good():
    return _case()
