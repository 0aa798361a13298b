"""W205 fp16-overflow: weights overflow float16.

Why: many loaders cast to float16 (AutoAWQ and AutoGPTQ by default, vLLM's AWQ and older GPTQ kernels because they
must). Values beyond 65,504 become Inf there, and the next matrix product is Inf or NaN.

Seen as:
- ExLlamaV2: `Measurement/inference error (2)`
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`
- llama.cpp: `cannot be represented within F16, but within BF16`
- ExLlamaV2: `Measurement/inference error (3)`
- AutoAWQ: `in _compute_best_scale`

Do: keep this model in bfloat16 from end to end (compressed-tensors, or GPTQ on a Marlin kernel), and never
load it with `torch_dtype=float16`.

False alarms: a tensor that no program casts, for instance a constant kept in float32 by name.

Fix safety: unsafe, and only by name: the values become the largest that float16 holds, which changes the model. A model
kept in bfloat16 needs no fix.

Sources: ggml-org/llama.cpp issue 14788; turboderp/exllamav2 issue 600.
"""

from doctor.lint.rule import ClampTensor, Fix, _, finding, plural, rule
from doctor.lint.testing import encode, tiny

FP16_MAX = 65504  # the largest finite float16


@rule("W205", "warning", certainty="likely")
def fp16_overflow(tensor, n_fp16_overflow, absmax):
    # Masks such as GPT-Neo's masked_bias hold -1e9 by design and are not weights.
    if not n_fp16_overflow or not tensor.name.endswith((".weight", ".bias")):
        return
    yield finding(
        plural(
            "{n:,} value of {tensor} is beyond {limit:,}, the largest float16 (largest {absmax:,.0f})",
            "{n:,} values of {tensor} are beyond {limit:,}, the largest float16 (largest {absmax:,.0f})",
            n_fp16_overflow,
            tensor=tensor.name,
            limit=FP16_MAX,
            absmax=absmax,
        ),
        fix=Fix(
            _("clamp to ±{limit:,}", limit=FP16_MAX),
            (ClampTensor(tensor.name, float(FP16_MAX)),),
            "unsafe",
            by_name=True,
        ),
        evidence={"n_fp16_overflow": n_fp16_overflow, "absmax": absmax},
        advice=_("keep the model in bfloat16: a cast to float16 makes these Inf"),
    )


def bad():
    case = tiny()
    case.down()[3, 5] = encode([1e6], "BF16")[0]
    return case, f"1 value of {case.name('down')} is beyond 65,504, the largest float16 (largest 999,424)"


def good():
    return tiny()
