"""What may be said of a comparison in which no rule found a fault: whether the two agree; and of a preflight."""

from collections.abc import Mapping
from typing import Any

from doctor.core.messages import Message, _, plural
from doctor.report.text import number

CLOSE = 0.02  # of perplexity: what may be called agreement


def closeness(compared: Mapping[str, Any], plan: str) -> Message:
    """What a comparison without an error says: that they agree only where perplexity can hardly have moved by more than
    CLOSE, and else by how much it has.
    """
    before, after = compared.get("perplexity_original"), compared.get("perplexity_quantized")
    if before is None or after is None or not (number(before) and number(after) and before > 0):
        return _("compared with its original: {plan}", plan=plan)
    ratio, span = after / before, compared.get("ratio_span") or ()
    ends = [x for x in span if number(x)] or [ratio]
    if all(1 - CLOSE <= x <= 1 + CLOSE for x in ends):
        return _("agrees with its original: {plan}", plan=plan)
    return _("perplexity {change} against its original: {plan}", change=f"{ratio - 1:+.1%}", plan=plan)


def layers_tried(n: int, plan: str) -> Message:
    """What a preflight did."""
    return plural("{n} layer tried, nothing written: {plan}", "{n} layers tried, nothing written: {plan}", n, plan=plan)
