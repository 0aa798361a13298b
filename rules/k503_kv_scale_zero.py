"""K503 kv-scale-zero: KV cache scale is 0 or negative.

Why: keys and values are divided by it: every entry of the cache becomes NaN or Inf, and the reply is one token without
end. A negative scale means "none" to vLLM, which then asserts or takes 1.0.

Do: calibrate again, with text that reaches this decoder layer.

False alarms: none; division by 0 has no result.

Fix safety: unsafe, and only with `--from`: the scale is taken from another copy of this checkpoint. Without one it
needs a calibration.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/kv_cache.py.
"""

from doctor.lint.rule import _, finding, rule, tensor_from_base
from doctor.lint.testing import np, tiny_packed

SCALES = (".k_scale", ".v_scale", ".kv_scale")


@rule("K503", "error")
def kv_scale_zero(tensor, n_zero, numel, stats, base):
    if not tensor.name.endswith(SCALES):
        return
    if stats.min < 0:
        yield finding(
            _("{tensor} is {value:g}; must be above 0", tensor=tensor.name, value=stats.min),
            evidence={"min": stats.min},
            fix=tensor_from_base(base, tensor),
            advice=_("calibrate the cache again"),
        )
    elif n_zero:
        yield finding(
            _("{n_zero:,} of {numel:,} scales in {tensor} are 0", n_zero=n_zero, numel=numel, tensor=tensor.name),
            evidence={"n_zero": n_zero, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice=_("calibrate the cache again"),
        )


SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def with_cache():
    """A quantized checkpoint that asks for its cache in 8 bits, with every scale."""
    case = tiny_packed()
    case.config["quantization_config"]["kv_cache_scheme"] = dict(SCHEME)
    for layer in range(2):
        for tail in ("k_scale", "v_scale"):
            name = f"model.layers.{layer}.self_attn.{tail}"
            case.tensors[name], case.dtypes[name] = np.full(1, 0.02, np.float32), "F32"
    return case


def bad():
    case = with_cache()
    name = "model.layers.0.self_attn.k_scale"
    case.tensors[name] = np.zeros(1, np.float32)
    return case, f"1 of 1 scales in {name} are 0"


def good():
    return with_cache()
