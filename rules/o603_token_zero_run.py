"""O603 token-zero-run: quantized model generates only token 0 ("!!!!").

Why: argmax over logits that are all NaN or all equal returns the first: id 0, which byte-level vocabularies print as
"!". It is not a fallback of the tokenizer; the logits hold no prediction.

Seen as:
- vLLM: `!!!!!!!!!!!!!!!!`
- vLLM: `outputs all token-0`

Do: see O602, and O608 for zero points stored in the convention of the other GPTQ version.

False alarms: a prompt whose right answer is token 0. Where the original generates it as often, nothing is reported.

Fix safety: no fix: quantize again.

Sources: vllm-project/vllm issue 38966; QwenLM/Qwen issue 381; QwenLM/Qwen2 docs (known issues of the 32B
GPTQ model).
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

SHARE = 0.5  # of the generated tokens; a correct model generates id 0 now and then, a broken one nothing else


@rule("O603", "error", implied_by=("O602", "O606", "O616"))
def token_zero_run(checkpoint, comparison):
    if not (comparison.generated and comparison.token0_share > SHARE >= comparison.token0_share_original):
        return
    yield finding(
        _(
            "{share:.0%} of {generated:,} generated tokens are id 0 (above {limit:.0%} is a collapse)",
            share=comparison.token0_share,
            generated=comparison.generated,
            limit=SHARE,
        ),
        evidence={"token0_share": comparison.token0_share, "generated": comparison.generated},
        advice=_("look for scales and logits that are not finite"),
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", token0_share=1.0)
    return case, "100% of 256 generated tokens are id 0 (above 50% is a collapse)"


def good():
    case = compared()
    change(case, "checkpoint:", "comparison", token0_share=0.7, token0_share_original=0.7)
    return case
