"""O602 nonfinite-logits: quantized model generates NaN or Inf logits.

Why: with NaN among the logits greedy decoding returns id 0, which is "!" in Qwen's and GPT-2's vocabularies, and
sampling stops with an error. The cause is a scale that is not finite, or one that makes a decoder layer overflow.

Seen as:
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`
- vLLM: `!!!!!!!!!!!!!!!!`

Do: `doctor check` on the output finds scales that are not finite. The decoder layer at which the error becomes NaN
shows where to look for other causes.

False alarms: none; the rows were counted in float32.

Fix safety: no fix: quantize again.

Sources: vllm-project/vllm issues 3998, 14126 and 38966; AutoGPTQ/AutoGPTQ issues 306, 582 and 587.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared


@rule("O602", "error", implied_by=("O606",))
def nonfinite_logits(checkpoint, comparison):
    if not comparison.nonfinite_quantized:
        return
    first = next((i for i, e in enumerate(comparison.block_errors) if not e < float("inf")), None)
    rows = {"nonfinite": comparison.nonfinite_quantized, "tokens": comparison.tokens}
    yield finding(
        _("{nonfinite:,} of {tokens:,} rows of logits hold NaN or Inf", **rows)
        if first is None
        else _(
            "{nonfinite:,} of {tokens:,} rows of logits hold NaN or Inf; layer {layer} is the first whose output is not finite",
            layer=first,
            **rows,
        ),
        evidence=rows,
        advice=_("run doctor check on the output, then quantize that layer again"),
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", nonfinite_quantized=8192, block_errors=(0.01, float("nan")))
    return (
        case,
        "8,192 of 8,192 rows of logits hold NaN or Inf; layer 1 is the first whose output is not finite",
    )


def good():
    return compared()
