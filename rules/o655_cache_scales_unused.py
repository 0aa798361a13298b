"""O655 cache-scales-unused: cache scales are stored, and nothing asks for that cache.

Why: vLLM takes the type of the key-value cache from kv_cache_scheme or kv_cache_quant_algo. Without it the cache stays
in 16 bits, and the scales do nothing until somebody starts the server with `--kv-cache-dtype fp8`.

Do: state kv_cache_scheme again where the cache is meant to be in 8 bits; merging and editing tools drop it.

False alarms: scales that are kept for `--kv-cache-dtype fp8`.

Fix safety: no fix: whether the cache is meant to be in 8 bits is not in the files.

Sources: run with vLLM 0.32 (the same logits with and without such scales); vllm-project/vllm
vllm/model_executor/layers/quantization/kv_cache.py and vllm/utils/torch_utils.py.
"""

import re

from doctor.lint.rule import Place, _, finding, plural, rule
from doctor.lint.testing import np, tiny_gptq

SCALE = re.compile(r"\.(?:attn\.)?(?:[kv]_proj\.)?[kv]_scale$")
STATED = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_method")


@rule("O655", "info")
def cache_scales_unused(checkpoint, quantization_block, tensors):
    raw: dict = {}
    file, pointer = "config.json", ""
    if quantization_block is not None:
        raw, file, pointer = quantization_block
    inner = raw.get("quantization")
    if any(part.get(key) for part in (raw, inner if isinstance(inner, dict) else {}) for key in STATED):
        return
    ending = [name for name in tensors if name.endswith("_scale")]  # a header may hold 100,000 names
    found = sorted(name for name in ending if tensors[name].numel == 1 and SCALE.search(name))
    if found:
        yield finding(
            plural(
                "{n:,} scale of the key-value cache is stored ({first}), and no kv_cache_scheme: the cache stays in 16 bits",
                "{n:,} scales of the key-value cache are stored (first {first}), and no kv_cache_scheme: "
                "the cache stays in 16 bits",
                len(found),
                first=found[0],
            ),
            at=Place(file, pointer=pointer or None),
            evidence={"scales": found[:100]},
            advice=_("state kv_cache_scheme, if the cache is meant to be in 8 bits"),
        )


def bad():
    case = tiny_gptq()
    for layer in range(2):
        for one in "kv":
            name = f"model.layers.{layer}.self_attn.{one}_scale"
            case.tensors[name], case.dtypes[name] = np.array([0.02], np.float32), "F32"
    return case, (
        "4 scales of the key-value cache are stored (first model.layers.0.self_attn.k_scale), and no kv_cache_scheme: "
        "the cache stays in 16 bits"
    )


def good():
    return tiny_gptq()
