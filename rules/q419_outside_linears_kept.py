"""Q419 outside-linears-kept: linears outside the decoder layers stay in 16 bits.

Why: a run quantizes the decoder layers that text runs through. What is beside them has no calibration input: a layer of
multi-token prediction (Qwen3-Next's `mtp.`, GLM-4.5's layer behind the last), an Omni model's talker. Its linears are
written as they are, and the output's config says so, but they make the output larger than 4 bits a weight.

Seen as:
- vLLM: a speculative decoder that takes as much memory as before

Do: nothing, or drop the layers that will not be served. Those of multi-token prediction are small, and speculative
decoding gains from their precision.

False alarms: none; it reports what was done. Linears that --ignore names are not reported.

Fix safety: no fix: the output is sound.

Sources: vllm-project/vllm vllm/model_executor/models/qwen3_next_mtp.py; transformers modeling_qwen3_next.py
(_keys_to_ignore_on_load_unexpected).
"""

from doctor.lint.rule import finding, plural, rule
from doctor.lint.testing import measured


@rule("Q419", "info")
def outside_linears_kept(checkpoint, outside_linears):
    if outside_linears:
        yield finding(
            plural(
                "{n:,} linear outside the decoder layers stays in 16 bits: {first}",
                "{n:,} linears outside the decoder layers stay in 16 bits, first {first}",
                len(outside_linears),
                first=outside_linears[0],
            ),
            evidence={"linears": list(outside_linears[:100])},
        )


def bad():
    case = measured()
    case.put("checkpoint:", "outside_linears", ("mtp.layers.0.mlp.up_proj", "mtp.layers.0.mlp.down_proj"))
    return case, "2 linears outside the decoder layers stay in 16 bits, first mtp.layers.0.mlp.up_proj"


def good():
    case = measured()
    case.put("checkpoint:", "outside_linears", ())
    return case
