"""O615 float16-overflow: activations of the original overflow float16 or come close.

Why: most GPTQ and AWQ kernels compute in float16, whose largest number is 65,504. Models are trained in bfloat16, where
10^38 is no problem. One activation beyond the range is Inf, the next norm turns it into NaN, and the reply is token 0
without end. The original shows this before any quantization.

Seen as:
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`
- vLLM: `!!!!!!!!!!!!!!!!`
- vLLM: `torch.bfloat16 is not supported for quantization method awq`

Do: serve in bfloat16 (`--dtype bfloat16` with a Marlin kernel: 4 or 8 bits, groups of 32, 64 or 128, symmetric
for GPTQ), and keep "torch_dtype": "bfloat16" in config.json.

False alarms: engines that keep the residual stream in float32. Close to the end of the range, other text may or may not
exceed it.

Fix safety: no fix: scaling activations down requires another model definition.

Sources: vllm-project/vllm issue 1941; huggingface/transformers src/transformers/models/t5/modeling_t5.py (clamps
float16 activations before they become Inf); turboderp/exllamav2 issue 493.
"""

from dataclasses import replace
from typing import Any

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

FP16_MAX = 65504  # the largest finite float16
# Of that range, on a few thousand tokens. Above, other text may well exceed it. SmolLM2-135M, correct in float16,
# reaches 0.37: one channel of the first token's residual stream, which no text moves.
NEAR = 0.5


@rule("O615", "error", implied_by=("O606",))
def float16_overflow(checkpoint, comparison, spec):
    half = comparison.half
    if half is None:
        return
    evidence = {
        "absmax": half.absmax,
        "place": half.place,
        "nonfinite_float16": half.nonfinite_float16,
        "kl_float16": half.kl_float16,
        "kl_bfloat16": half.kl_bfloat16,
    }
    stated = str(spec.config.get("dtype") or spec.config.get("torch_dtype") or "").removeprefix("torch.")
    if half.first is not None or half.nonfinite_float16:
        place, size = half.first or (half.place, half.absmax)
        yield finding(
            _(
                "{place} reaches {size:,.0f}, float16 ends at {limit:,}: run in float16, {n:,} of {tokens:,} rows of the original's "
                "logits hold NaN or Inf (in bfloat16 {n_bfloat16:,})",
                place=place,
                size=size,
                limit=FP16_MAX,
                n=half.nonfinite_float16,
                tokens=half.tokens,
                n_bfloat16=half.nonfinite_bfloat16,
            ),
            severity="error" if stated == "float16" else "warning",
            evidence=evidence,
            advice=_('serve in bfloat16, and leave no "float16" in config.json'),
        )
    elif not half.absmax <= NEAR * FP16_MAX:
        yield finding(
            _(
                "{place} reaches {size:,.0f}, {share:.0%} of float16's range, on {tokens:,} tokens; other text may exceed it",
                place=half.place,
                size=half.absmax,
                share=half.absmax / FP16_MAX,
                tokens=comparison.tokens,
            ),
            severity="info",
            evidence=evidence,
            advice=_("serve in bfloat16 where the kernel can"),
        )


def bad():
    case = compared()
    comparison: Any = case.facts["checkpoint:", "comparison"]
    half = comparison.half
    place = "the input of model.layers.1.mlp.down_proj"
    broken = replace(
        half, absmax=151552.0, place=place, first=(place, 151552.0), nonfinite_float16=1022, kl_float16=float("nan")
    )
    change(case, "checkpoint:", "comparison", half=broken)
    return case, (
        f"{place} reaches 151,552, float16 ends at 65,504: run in float16, 1,022 of 1,022 rows of the original's logits hold NaN or Inf "
        "(in bfloat16 0)"
    )


def good():
    return compared()
