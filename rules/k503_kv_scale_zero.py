"""K503 kv-scale-zero: a scale of the KV cache is 0.

Why: keys and values are divided by it: every entry of the cache becomes NaN or Inf, and the reply one token
for ever.

Do: calibrate again, with text that reaches this block.

False alarms: none; nothing can be divided by 0.

Fix safety: unsafe, and only with `--from`: the scale is taken from another copy of this checkpoint. Without one it
needs a calibration.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/kv_cache.py.

标题: KV 缓存的一个缩放因子是 0

原因: 键和值要除以它：缓存里全是 NaN 或 Inf，回答永远是同一个词元。

处理: 重新校准，所用文本要能激活到这一层。

误报: 无；任何数都不能除以 0。

修复: 不安全，且需 `--from`：从此检查点的另一份副本取缩放因子。没有副本就要靠校准得出。
"""

from doctor.lint.rule import finding, rule, tensor_from_base
from doctor.lint.testing import np, tiny_gptq

SCALES = (".k_scale", ".v_scale", ".kv_scale")


@rule("K503", "error")
def kv_scale_zero(tensor, n_zero, numel, base):
    if tensor.name.endswith(SCALES) and n_zero:
        yield finding(
            f"{n_zero} of {numel} scales in {tensor.name} are 0",
            evidence={"n_zero": n_zero, "numel": numel},
            fix=tensor_from_base(base, tensor),
            advice="calibrate the cache again",
        )


def bad():
    case = tiny_gptq()
    name = "model.layers.0.self_attn.k_scale"
    case.tensors[name], case.dtypes[name] = np.zeros(1, np.float32), "F32"
    return case, f"1 of 1 scales in {name} are 0"


def good():
    case = tiny_gptq()
    for tail in ("k_scale", "v_scale"):
        name = f"model.layers.0.self_attn.{tail}"
        case.tensors[name], case.dtypes[name] = np.full(1, 0.02, np.float32), "F32"
    return case
