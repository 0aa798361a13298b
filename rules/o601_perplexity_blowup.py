"""O601 perplexity-blowup: the quantized model predicts text far worse than its original.

Why: perplexity is the inverse of the mean probability of the right token, so a model that lost its way
shows here first. At 4 bits with groups of 128 most models lose under 5 percent, small ones up to 15.

Seen as:
- ExLlamaV2: `calibration perplexity (quant)`

Do: look at the error after each block (`doctor verify` lists it): a jump names the block. Then see that
block's Q findings, or take more bits.

False alarms: perplexity of an instruct model on plain text moves more than its replies do.

Fix safety: no fix: quantize again.

Sources: Frantar et al. 2022 (arXiv 2210.17323) table 4; turboderp/exllamav2 issue 246 (2,745 where about 5
was right); QwenLM/Qwen2 docs (4-bit models of 0.5 B and 1.5 B lose 3 to 5 points).

标题: 量化后的模型预测文本远不如原模型

原因: 困惑度是正确词元概率的（几何）平均的倒数，模型一旦走样，最先在这里看出来。4 位、分组 128 时，多数模型变
差不到 5%，小模型至多 15%。

处理: 看逐层误差（`doctor verify` 会列出）：跳变处就是出问题的层。再看该层的 Q 类发现，或提高位数。

误报: 指令模型在普通文本上的困惑度，变化比它的回答更大。

修复: 不提供修复：重新量化。
"""

from doctor.rule import finding, rule
from doctor.testing import change, compared

# Ratios of the two perplexities. Up to 1.25 even small models at 4 bits stay; from 2 on replies fall apart.
NOTABLE, BROKEN = 1.25, 2.0


@rule("O601", "error", implied_by=("O602", "O606", "O616"))
def perplexity_blowup(checkpoint, comparison):
    before, after = comparison.perplexity_original, comparison.perplexity_quantized
    if (
        after <= NOTABLE * before or not before == before
    ):  # not before == before: the original is NaN, which is O606
        return
    errors = comparison.block_errors
    jumps = [b - a for a, b in zip((0.0, *errors), errors)]
    worst = f"; the error grows most in block {jumps.index(max(jumps))}" if jumps else ""
    yield finding(
        f"perplexity {before:.2f} became {after:.2f} on {comparison.tokens:,} tokens in rows of {comparison.context} (up to {NOTABLE} × passes, "
        f"above {BROKEN:g} × is broken){worst}",
        severity="error" if not after <= BROKEN * before else "warning",
        evidence={
            "original": before,
            "quantized": after,
            "tokens": comparison.tokens,
            "context": comparison.context,
        },
        advice="see the Q findings of that block, or take more bits or smaller groups",
    )


def bad():
    case = compared()
    change(case, "checkpoint:", "comparison", perplexity_quantized=61.5, block_errors=(0.01, 0.9))
    return (
        case,
        "perplexity 12.00 became 61.50 on 8,192 tokens in rows of 512 (up to 1.25 × passes, above 2 × is broken); the error grows most in block 1",
    )


def good():
    return compared()
