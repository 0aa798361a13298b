"""C147 already-quantized: the weights are stored in a quantized form from which nothing can be quantized again.

Why: their numbers mean something only together with their scales. Read as plain weights they are wrong by orders of magnitude: mlx once
took bytes for integers, a factor of 20,000.

Seen as:
- AutoAWQ: `AssertionError`
- vLLM: `Cannot find the config file for`
- llama.cpp: `NotImplementedError: Quant method is not yet supported`

Do: take the 16-bit original. DeepSeek publishes a script (fp8_cast_bf16.py) that undoes its own.

False alarms: packed GPTQ, AWQ and compressed-tensors checkpoints are outputs of a quantizer and judged as such (O6xx); `doctor quantize`
refuses them by itself.

Fix safety: manual; what rounding took away does not come back.

Sources: ml-explore/mlx-lm issue 1192; ModelCloud/GPTQModel PR 2827; transformers PR 46763.
"""

import re

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

SCALES = re.compile(r"\.(weight_scale_inv|weight_scale|SCB|absmax|quant_state\.bitsandbytes__\w+|quant_map|_scales)$|_(blocks|scales)$")


@rule("C147", "error", implied_by=("F002", "F005"))
def already_quantized(checkpoint, tensors, config, quantization_block):
    if any(n.endswith((".qweight", ".weight_packed")) for n in tensors):
        return
    narrow = [i for n, i in sorted(tensors.items()) if n.endswith((".weight", "_blocks", "_proj")) and len(i.shape) >= 2
              and (i.dtype.bits < 16 and i.dtype.name != "BOOL")]
    scales = [n for n in tensors if SCALES.search(n)]
    if not narrow:
        return
    first = narrow[0]
    method = (quantization_block or ({},))[0].get("quant_method")
    by = f" by {method}" if method else ""
    yield finding(f"{len(narrow):,} weights are stored in {first.dtype.name}{by} with {len(scales):,} tensors of scales, the first is {first.name}",
                  at=Place(first.shard, tensor=first.name), evidence={"weights": len(narrow), "scales": len(scales), "dtype": first.dtype.name},
                  fix=Fix("take the 16-bit original", (), "manual"))


def bad():
    import numpy as np

    case = tiny("llama")
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        case.tensors[name] = rng.integers(1, 0x78, case.tensors[name].shape, np.uint8)
        case.tensors[name + "_scale_inv"] = np.full((1, 1), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", name + "_scale_inv": "F32"}
    case.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return case, "14 weights are stored in F8_E4M3 by fp8 with 14 tensors of scales, the first is model.layers.0.mlp.down_proj.weight"


def good():
    return tiny()
