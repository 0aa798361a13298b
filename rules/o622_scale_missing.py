"""O622 scale-missing: quantized weight lacks one of its scales.

Why: engines make a parameter for each scale that the format has and fill it from the file. One that is missing keeps
what memory held: the linear's output is NaN or noise, and nothing is printed. Activations that are quantized with
measured scales need input_scale of every linear.

Seen as:
- vLLM: `Following weights were not initialized from checkpoint`
- SGLang: `input_scale`

Do: copy the shard again from its source, or calibrate and export again.

False alarms: an engine that measures activations while it serves and ignores these scales.

Fix safety: no fix: scales are measured, not computed.

Sources: vllm-project/vllm vllm/model_executor/layers/quantization/modelopt.py (ModelOptNvFp4LinearMethod) and fp8.py
(activation_scheme static).
"""

from doctor.lint.rule import Place, _, finding, lacks, listed, plural, rule
from doctor.lint.testing import np, tiny


@rule("O622", "error", implied_by=("F001", "F010", "O621"))
def scale_missing(checkpoint, stored_weights):
    for absent, weights in sorted(lacks(stored_weights).items()):
        first = weights[0]
        yield finding(
            plural(
                "{n:,} quantized weight has no {absent} ({first})",
                "{n:,} quantized weights have no {absent} (first {first})",
                len(weights),
                absent=listed(absent),
                first=first.info.name,
            ),
            at=Place(first.info.shard, tensor=first.info.name),
            evidence={"absent": list(absent), "weights": len(weights), "of": len(stored_weights)},
            advice=_("copy the shard again from its source, or calibrate and export again"),
        )


def bad():
    case = tiny()
    module = case.name("down").removesuffix(".weight")
    for linear in case.spec.linears:
        _in_four_bits(case, linear.tensor)
    case.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    del case.tensors[f"{module}.input_scale"], case.dtypes[f"{module}.input_scale"]
    return case, f"1 quantized weight has no input_scale ({module}.weight)"


def _in_four_bits(case, name):
    rng = np.random.default_rng(3)
    module, (n, k) = name.removesuffix(".weight"), case.tensors[name].shape
    case.tensors |= {
        name: rng.integers(0, 256, (n, k // 2), np.uint8),
        f"{module}.weight_scale": rng.integers(0x30, 0x7F, (n, k // 16), np.uint8),
        f"{module}.weight_scale_2": np.full((), 0.0001, np.float32),
        f"{module}.input_scale": np.full((), 0.02, np.float32),
    }
    case.dtypes |= {
        name: "U8",
        f"{module}.weight_scale": "F8_E4M3",
        f"{module}.weight_scale_2": "F32",
        f"{module}.input_scale": "F32",
    }


def good():
    return tiny()
