"""C153 stale-quantization-config: config.json has quantization_config, but the weights are unquantized.

Why: readers build quantized linears and find no packed weights for them. A model that was dequantized, or a fine-tune
saved from a quantized one, keeps the entry.

Seen as:
- transformers: `Some weights of`
- vLLM: `KeyError: 'model.layers.`
- AutoGPTQ: `The model is already quantized`

Do: remove quantization_config.

False alarms: entries that describe only the cache or activations are not reported. Formats that quantize while loading
(bitsandbytes and similar) keep unquantized weights on purpose and are not counted.

Fix safety: safe: nothing in the files is quantized.

Sources: transformers src/transformers/quantizers/auto.py; vllm-project/vllm vllm/model_executor/layers/quantization.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, rule, says_packed, shows_packing
from doctor.lint.testing import tiny


@rule("C153", "error")
def stale_quantization_config(checkpoint, tensors, quantization_block):
    if quantization_block is None:
        return
    raw, file, pointer = quantization_block
    if not says_packed(raw) or not pointer:
        return
    if any(map(shows_packing, tensors)) or any(i.dtype.bits < 16 for i in tensors.values()):
        return
    yield finding(
        _(
            "quantization_config names {method}, but all {count:,} tensors are unquantized",
            method=raw.get("quant_method", "-"),
            count=len(tensors),
        ),
        at=Place(file, pointer=pointer),
        evidence={"method": raw.get("quant_method", "-")},
        fix=Fix(_("remove quantization_config"), (RemoveJson(file, pointer, raw),)),
    )


def bad():
    case = tiny()
    case.config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    return case, f"quantization_config names awq, but all {len(case.tensors)} tensors are unquantized"


def good():
    return tiny()
