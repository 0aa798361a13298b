"""O602 nonfinite-logits: the quantized model puts out NaN or Inf.

Why: with NaN among the logits greedy decoding returns id 0, which is "!" in Qwen's and GPT-2's
vocabularies, and sampling stops with an error. A scale that is not finite, or one that makes a block
overflow, does this.

Seen as:
- PyTorch: `probability tensor contains either `inf`, `nan` or element < 0`
- vLLM: `!!!!!!!!!!!!!!!!`

Do: `doctor check` on the output finds scales that are not finite; the block at which the error turns NaN
names the rest.

False alarms: none; the rows were counted in float32.

Fix safety: no fix: quantize again.

Sources: vllm-project/vllm issues 3998, 14126 and 38966; AutoGPTQ/AutoGPTQ issues 306, 582 and 587.
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared


@rule("O602", "error", implied_by=("O606",))
def nonfinite_logits(checkpoint, comparison):
    if not comparison.nonfinite_quantized:
        return
    first = next((i for i, e in enumerate(comparison.block_errors) if not e < float("inf")), None)
    place = f"; the first block whose output is not finite is {first}" if first is not None else ""
    yield finding(
        f"{comparison.nonfinite_quantized:,} of {comparison.tokens:,} rows of logits hold NaN or Inf{place}",
        evidence={"nonfinite": comparison.nonfinite_quantized, "tokens": comparison.tokens},
        advice="run doctor check on the output, then quantize that block again",
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", nonfinite_quantized=8192, block_errors=(0.01, float("nan")))
    return (
        case,
        "8,192 of 8,192 rows of logits hold NaN or Inf; the first block whose output is not finite is 1",
    )


def good():
    return compared()
