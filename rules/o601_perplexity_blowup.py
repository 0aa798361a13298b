"""O601 perplexity-blowup: perplexity of the quantized model is far above the original's.

Why: perplexity is the inverse of the mean probability of the right token, so a damaged model shows here first. At 4
bits with groups of 128 most models lose under 5 percent, small ones up to 15.

Seen as:
- ExLlamaV2: `calibration perplexity (quant)`

Do: look at the error of each decoder layer alone, given the original's input (`doctor verify` lists it). A layer far
above the others is the defective one, whatever the accumulated error does after it. See the Q findings of that layer,
and quantize it again. Where no layer exceeds the others, all lose: use more bits or smaller groups.

False alarms: perplexity of an instruct model on plain text changes more than its replies do.

Fix safety: no fix: quantize again.

Sources: Frantar et al. 2022 (arXiv 2210.17323) table 4; turboderp/exllamav2 issue 246 (2,745 where about 5
was right); QwenLM/Qwen2 docs (4-bit models of 0.5 B and 1.5 B lose 3 to 5 points).
"""

import math
from itertools import pairwise
from statistics import median

from doctor.lint.rule import _, finding, rule
from doctor.lint.testing import change, compared

# Ratios of the two perplexities. Up to 1.25 even small models at 4 bits stay; from 2 on replies fall apart.
NOTABLE, BROKEN = 1.25, 2.0
# The error of a decoder layer alone against the median of the other layers. Layers of correct copies stay below 1.5
# times (SmolLM2-135M with RTN at 4 bits: 1.4), one linear of another layer makes 3.2; below 2 no layer is named, because
# the difference may come from the layer itself.
OUTLIER = 2.0


@rule("O601", "error", implied_by=("O602", "O606", "O616"))
def perplexity_blowup(checkpoint, comparison):
    before, after = comparison.perplexity_original, comparison.perplexity_quantized
    if after <= NOTABLE * before or math.isnan(before):  # the original's is NaN: O606 reports it
        return
    yield finding(
        _message(comparison),
        severity="error" if not after <= BROKEN * before else "warning",
        evidence={
            "original": before,
            "quantized": after,
            "tokens": comparison.tokens,
            "context": comparison.context,
        },
        strip={
            label: list(errors)
            for label, errors in (
                ("each layer alone", comparison.own_errors),
                ("carried along", comparison.block_errors),
            )
            if errors
        }
        or None,
        advice=_(
            "see the Q findings of that layer and quantize it again; where all layers are off, use more bits or smaller groups"
        ),
    )


def _message(comparison):
    """The two perplexities, and which decoder layer to look at: the one that is an outlier by itself, else the one
    after which the accumulated error has grown most.
    """
    values = {
        "before": comparison.perplexity_original,
        "after": comparison.perplexity_quantized,
        "tokens": comparison.tokens,
        "context": comparison.context,
        "notable": NOTABLE,
        "broken": BROKEN,
    }
    own, errors = {i: e for i, e in enumerate(comparison.own_errors) if math.isfinite(e)}, comparison.block_errors
    if len(own) > 1:
        worst = max(own, key=own.__getitem__)
        others = median(e for i, e in own.items() if i != worst)
        if own[worst] > OUTLIER * others:
            return _(
                "perplexity rose from {before:.2f} to {after:.2f} on {tokens:,} tokens in rows of {context} (up to {notable} × "
                "passes, above {broken:g} × is broken); layer {layer} is defective: alone, given the original's input, its error is "
                "{error:.0%}, that of the other layers {others:.0%} (median)",
                layer=worst,
                error=own[worst],
                others=others,
                **values,
            )
    jumps = [b - a for a, b in pairwise((0.0, *errors))]
    if jumps:
        return _(
            "perplexity rose from {before:.2f} to {after:.2f} on {tokens:,} tokens in rows of {context} (up to {notable} × passes, "
            "above {broken:g} × is broken); the error grows most in layer {layer}",
            layer=jumps.index(max(jumps)),
            **values,
        )
    return _(
        "perplexity rose from {before:.2f} to {after:.2f} on {tokens:,} tokens in rows of {context} (up to {notable} × passes, "
        "above {broken:g} × is broken)",
        **values,
    )


def bad():
    case = compared()
    change(
        case, "checkpoint:", "comparison", perplexity_quantized=61.5, own_errors=(0.05, 0.06), block_errors=(0.01, 0.9)
    )
    return (
        case,
        "perplexity rose from 12.00 to 61.50 on 8,192 tokens in rows of 512 (up to 1.25 × passes, above 2 × is broken); "
        "the error grows most in layer 1",
    )


def more():
    """A late layer amplifies the error of an early one."""
    case = compared()
    change(case, "checkpoint:", "comparison", perplexity_quantized=61.5, own_errors=(0.7, 0.2), block_errors=(0.3, 0.9))
    yield case


def good():
    return compared()
