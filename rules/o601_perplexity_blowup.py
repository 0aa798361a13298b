"""O601 perplexity-blowup: the quantized model predicts text far worse than its original.

Why: perplexity is the inverse of the mean probability of the right token, so a model that lost its way
shows here first. At 4 bits with groups of 128 most models lose under 5 percent, small ones up to 15.

Seen as:
- ExLlamaV2: `calibration perplexity (quant)`

Do: look at the error of each block alone, given the original's input (`doctor verify` lists it): one that
stands out is the wrong block, whatever the error carried along does after it. Then see that block's Q findings,
and quantize it again. Where none stands out, all lose: take more bits or smaller groups.

False alarms: perplexity of an instruct model on plain text moves more than its replies do.

Fix safety: no fix: quantize again.

Sources: Frantar et al. 2022 (arXiv 2210.17323) table 4; turboderp/exllamav2 issue 246 (2,745 where about 5
was right); QwenLM/Qwen2 docs (4-bit models of 0.5 B and 1.5 B lose 3 to 5 points).
"""

import math
from statistics import median

from doctor.lint.rule import finding, rule
from doctor.lint.testing import change, compared

# Ratios of the two perplexities. Up to 1.25 even small models at 4 bits stay; from 2 on replies fall apart.
NOTABLE, BROKEN = 1.25, 2.0
# A block's own error against the median of the other blocks'. Blocks of healthy copies stay below 1.5 times
# (SmolLM2-135M by rounding to 4 bits: 1.4), one linear of another block makes 3.2; below 2 no block is named, for the
# difference may be the block's nature.
OUTLIER = 2.0


@rule("O601", "error", implied_by=("O602", "O606", "O616"))
def perplexity_blowup(checkpoint, comparison):
    before, after = comparison.perplexity_original, comparison.perplexity_quantized
    if after <= NOTABLE * before or not before == before:  # not before == before: the original is NaN, which is O606
        return
    yield finding(
        f"perplexity {before:.2f} became {after:.2f} on {comparison.tokens:,} tokens in rows of {comparison.context} (up to {NOTABLE} × passes, "
        f"above {BROKEN:g} × is broken){_worst_block(comparison)}",
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
                ("each block alone", comparison.own_errors),
                ("carried along", comparison.block_errors),
            )
            if errors
        }
        or None,
        advice="see the Q findings of that block and quantize it again; where all blocks are off, take more bits or smaller groups",
    )


def _worst_block(comparison):
    """Which block to look at: the one that is an outlier by itself, else the one after which the error carried along
    has grown most.
    """
    own, errors = {i: e for i, e in enumerate(comparison.own_errors) if math.isfinite(e)}, comparison.block_errors
    if len(own) > 1:
        block = max(own, key=own.get)
        others = median(e for i, e in own.items() if i != block)
        if own[block] > OUTLIER * others:
            return f"; block {block} is the wrong one: alone, given the original's input, it is off by {own[block]:.0%}, the other blocks by {others:.0%} (median)"
    jumps = [b - a for a, b in zip((0.0, *errors), errors)]
    return f"; the error grows most in block {jumps.index(max(jumps))}" if jumps else ""


def bad():
    case = compared()
    change(
        case, "checkpoint:", "comparison", perplexity_quantized=61.5, own_errors=(0.05, 0.06), block_errors=(0.01, 0.9)
    )
    return (
        case,
        "perplexity 12.00 became 61.50 on 8,192 tokens in rows of 512 (up to 1.25 × passes, above 2 × is broken); the error grows most in block 1",
    )


def more():
    """A late block amplifies what an early one did."""
    case = compared()
    change(case, "checkpoint:", "comparison", perplexity_quantized=61.5, own_errors=(0.7, 0.2), block_errors=(0.3, 0.9))
    yield case


def good():
    return compared()
