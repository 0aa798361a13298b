"""O605 repeated-tokens: the quantized model repeats one token over and over.

Why: greedy replies of a damaged model fall into a loop of one token; those of a sound model loop over
phrases at most.

Do: compare the replies that the report shows side by side. If perplexity is fine, try a prompt in the
model's chat template.

False alarms: base models that continue a list or a line of dashes.

Fix safety: no fix: quantize again.

Sources: QwenLM/Qwen2 docs (4-bit 72B that does not stop); QwenLM/Qwen issue 315.
"""

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared

RUN = 12  # times in a row; dashes and dots of sound replies stay below


@rule("O605", "warning", certainty="likely", implied_by=("O601", "O602", "O603", "O606", "O616"))
def repeated_tokens(checkpoint, comparison):
    if comparison.longest_repeat < RUN or comparison.longest_repeat_original >= comparison.longest_repeat:
        return
    yield finding(
        f"one token stands {comparison.longest_repeat} times in a row in the quantized model's replies (fewer than {RUN} passes)",
        evidence={"longest_repeat": comparison.longest_repeat, "generated": comparison.generated},
        advice="compare the replies side by side",
    )


def bad():
    case = compared()
    change(
        case,
        "checkpoint:",
        "comparison",
        longest_repeat=64,
        replies=(("Once", "upon a time", "the the the"),),
    )
    return case, "one token stands 64 times in a row in the quantized model's replies (fewer than 12 passes)"


def good():
    case = compared()
    change(
        case, "checkpoint:", "comparison", longest_repeat=64, longest_repeat_original=64
    )  # the original says the same
    return case
