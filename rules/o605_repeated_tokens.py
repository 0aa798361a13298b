"""O605 repeated-tokens: quantized model repeats one token in a loop.

Why: greedy replies of a damaged model fall into a loop of one token; those of a correct model loop over phrases at
most.

Do: compare the replies that the report shows side by side. If perplexity is good, try a prompt in the model's chat
template.

False alarms: base models that continue a list or a line of dashes.

Fix safety: no fix: quantize again.

Sources: QwenLM/Qwen2 docs (4-bit 72B that does not stop); QwenLM/Qwen issue 315.
"""

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

RUN = 12  # times in a row; dashes and dots of correct replies stay below


@rule("O605", "warning", certainty="likely", implied_by=("O601", "O602", "O603", "O606", "O616"))
def repeated_tokens(checkpoint, comparison):
    if comparison.longest_repeat < RUN or comparison.longest_repeat_original >= comparison.longest_repeat:
        return
    yield finding(
        _(
            "one token occurs {repeats} times in a row in the quantized model's replies (fewer than {limit} passes)",
            repeats=comparison.longest_repeat,
            limit=RUN,
        ),
        evidence={"longest_repeat": comparison.longest_repeat, "generated": comparison.generated},
        advice=_("compare the replies side by side"),
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
    return case, "one token occurs 64 times in a row in the quantized model's replies (fewer than 12 passes)"


def good():
    case = compared()
    change(case, "checkpoint:", "comparison", longest_repeat=64, longest_repeat_original=64)  # so does the original
    return case
