"""K501 key-bias: key bias is too large for a low-bit KV cache.

Why: the bias is the same for every token, so it gives attention no information, yet it sets the largest value of its
group in the cache. The step of a 4-bit cache then exceeds the signal of the other channels. Measured on
Qwen2.5-Coder-0.5B (|bias| up to 211): perplexity 7.42 with 16 bits, 7.7 with 8-bit keys, 46.1 with 4-bit keys; with
4-bit values only 7.49.

Do: serve with 8-bit keys (ExLlamaV2 Q6 or Q8, llama.cpp --cache-type-k q8_0) and leave vLLM's cache dtype
on auto. The weights are fine to quantize.

False alarms: a large bias in a channel whose signal is large too. The family alone does not decide: Qwen2-72B is fine
at 4 bits.

Fix safety: no fix: the bias cannot be folded into other weights, because rotary positions rotate it at every token.

Sources: turboderp/exllamav2 issue 493; QwenLM/Qwen3 issue 840; vllm-project/vllm PR 11906;
ggml-org/llama.cpp issue 21385.
"""

import re

from doctor.lint.rule import _, fact, finding, rule
from doctor.lint.testing import encode, only_in, tiny

# Largest |bias| of a key channel. Measured per decoder layer on Qwen2.5-Coder-0.5B: below 30 the error of the attention logits
# at 4 bits stays under 0.6; 34 gave 0.8, 66 gave 1.3, 145 gave 19. From 60 on, 6 bits were not enough either.
NEEDS_SIX_BITS, NEEDS_EIGHT_BITS = 30, 60
_NUMBERED = re.compile(r"(.*?\.)(\d+)(\..*)$")
KEY_BIASES = (".k_proj.bias", ".key.bias", ".wk.bias")


@fact("tensor")
def key_bits(tensor, absmax, tensors):
    """Fewest bits (4, 6, 8) for cached keys by the largest value of a key bias; None for other tensors, and where a
    norm follows the projection.
    """
    if not tensor.name.endswith(KEY_BIASES):
        return None
    # A norm after the projection removes the size of the bias.
    attention = tensor.name.rsplit(".", 2)[0]
    if any(f"{attention}.{norm}.weight" in tensors for norm in ("k_norm", "k_layernorm", "key_norm")):
        return None
    return 8 if absmax > NEEDS_EIGHT_BITS else 6 if absmax > NEEDS_SIX_BITS else 4


@rule("K501", "warning", certainty="likely")
def key_bias(tensor, absmax, key_bits, largest_values, recipe):
    if key_bits in (None, 4) or recipe.kv_cache:  # an FP8 cache that is planned is K504's
        return
    yield finding(
        _(
            "{tensor} reaches {absmax:.0f}: a 4-bit KV cache may garble text",
            tensor=tensor.name,
            absmax=absmax,
        ),
        evidence={"absmax": absmax},
        strip={"largest |bias|": _across_layers(tensor.name, largest_values)},
        advice=_("serve with 8-bit keys; the weights can be quantized")
        if key_bits == 8
        else _("serve with 6-bit keys or more; the weights can be quantized"),
    )


def _across_layers(name, values):
    """The value of the same tensor in every decoder layer, in order."""
    place = _NUMBERED.match(name)
    if place is None:
        return [values[name]]
    others = ((_NUMBERED.match(other), value) for other, value in values.items() if other.endswith(place[3]))
    return [
        value
        for _layer, value in sorted(
            (int(m[2]), value) for m, value in others if m and (m[1], m[3]) == (place[1], place[3])
        )
    ]


def bad():
    case = tiny(only_in("qwen2", "qwen2_moe", "opt", why="its keys have no bias"))
    name = case.name("k").replace(".weight", ".bias")
    case.tensors[name][5] = encode([214.0], "BF16")[0]
    return case, f"{name} reaches 214: a 4-bit KV cache may garble text"


def good():
    return tiny(only_in("qwen2", "qwen2_moe", "opt", why="its keys have no bias"))
