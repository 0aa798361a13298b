"""K502 kv-scales-missing: KV cache quantization is configured, but its scales are missing.

Why: an FP8 cache stores keys and values divided by a scale. Without one the engine uses 1.0: values beyond 448
saturate, and small ones round to 0.

Seen as:
- vLLM: `KeyError: 'model.layers.0.self_attn.k_scale'`
- vLLM: `Using KV cache scaling factor 1.0 for fp8_e4m3`
- vLLM: `Checkpoint does not provide a q scaling factor`

Do: calibrate the scales (a kv_cache_scheme in llm-compressor), or remove the entry and leave the cache
dtype on auto.

False alarms: engines that compute scales while serving.

Fix safety: unsafe: the entry is removed, and the cache stays in 16 bits, which takes twice the memory. Scales need a
calibration.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/kv_cache.py; vllm-project/llm-compressor
issue 2176.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, rule
from doctor.lint.testing import tiny_gptq

SCALES = (".k_scale", ".v_scale", ".kv_scale")


@rule("K502", "warning")
def kv_scales_missing(checkpoint, quantization_block, tensors):
    if quantization_block is None:
        return
    raw, file, pointer = quantization_block
    key = next((k for k in ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_quant_method") if raw.get(k)), None)
    if key is None or any(name.endswith(SCALES) for name in tensors):
        return
    yield finding(
        _("{key} is set and no tensor ends in .k_scale or .v_scale: the cache would use scale 1.0", key=key),
        at=Place(file, pointer=f"{pointer}/{key}"),
        fix=Fix(_("remove {key}", key=key), (RemoveJson(file, f"{pointer}/{key}", raw[key]),), "unsafe"),
        advice=_("calibrate the scales, or remove the entry"),
    )


def bad():
    case = tiny_gptq()
    case.config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
    }
    return (
        case,
        "kv_cache_scheme is set and no tensor ends in .k_scale or .v_scale: the cache would use scale 1.0",
    )


def good():
    return tiny_gptq()
