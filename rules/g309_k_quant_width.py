"""G309 k-quant-width: a width is no multiple of 256, so llama.cpp cannot store it in a k-quant.

Why: k-quants pack 256 in_features together. Tensors of other widths fall back to a type with blocks of 32,
or to float16: the file grows (4.5 to 6.2 bits a weight in one report) without an error.

Seen as:
- llama.cpp: `not divisible by 256, required for`
- llama.cpp: `using fallback quantization`

Do: expect the larger file, choose a 32-block type (Q4_0, Q8_0, IQ4_NL) yourself, or pad the MLP width to a
multiple of 256.

False alarms: none for widths; the loss is size, not quality.

Fix safety: no fix: the model is sound.

Sources: ggml-org/llama.cpp gguf-py/gguf/constants.py (GGML_QUANT_SIZES), pull request 3747, issue 6614.

标题: 宽度不是 256 的倍数，llama.cpp 无法存成 k-quant

原因: k-quant 每 256 个 in_features 打包一次。其他宽度的张量会退回分块 32 的类型或 float16：文件变大（有人报告
每个权重从 4.5 位变成 6.2 位），却不报错。

处理: 接受更大的文件，或自行选择分块 32 的类型（Q4_0、Q8_0、IQ4_NL），或把 MLP 宽度补到 256 的倍数。

误报: 宽度的判断没有误报；损失的是体积，不是质量。

修复: 不提供修复：模型本身没有问题。
"""

from doctor.lint.rule import Place, finding, rule, size_key
from doctor.lint.testing import tiny

BLOCK, SMALL_BLOCK = 256, 32  # in_features in a block of a k-quant, and of the type it falls back to


@rule("G309", "info")
def k_quant_width(checkpoint, spec, recipe):
    if recipe.runtime != "llama.cpp":
        return
    widths = {}
    for linear in spec.linears:
        if linear.in_features % BLOCK:
            widths.setdefault(linear.in_features, []).append(linear)
    for width, linears in sorted(widths.items()):
        key = next((k for x in linears if (k := size_key(spec, x.name, 1))), None)
        fallback = "a 32-block type" if width % SMALL_BLOCK == 0 else "float16"
        yield finding(
            f"in_features {width} of {len(linears)} linears is no multiple of {BLOCK}: k-quants fall back to {fallback}",
            at=Place("config.json", pointer=spec.at(key) if key else None),
            evidence={"in_features": width, "linears": len(linears)},
            advice="expect a larger file, or choose Q4_0, Q8_0 or IQ4_NL yourself",
        )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "llama.cpp")
    return case, "in_features 64 of 12 linears is no multiple of 256: k-quants fall back to a 32-block type"


def good():
    return tiny()
