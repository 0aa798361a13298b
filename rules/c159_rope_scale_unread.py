"""C159 rope-scale-unread: linear rotary scaling stands in config.json, and the converter named does not read it there.

Why: ExLlamaV2's converter takes the scale from its own option. Without it, calibration runs on positions that the model
was not trained for, and the quantized layers fit other activations than serving has.

Do: give the converter the factor: `-rs FACTOR`.

False alarms: a version of the runtime that has learnt to read it. Nothing is wrong with the checkpoint.

Fix safety: no fix: the file is right.

Sources: turboderp/exllamav2 doc/convert.md.

标题: config.json 写有线性 RoPE 缩放，而指定的转换器不从那里读

原因: ExLlamaV2 的转换器从自己的选项取缩放值。不给的话，校准用的位置与训练时不同，量化后的各层适应的是另一种
激活值。

处理: 把系数交给转换器：`-rs FACTOR`。

误报: 该运行时的新版本可能已会读取。检查点没有任何问题。

修复: 不提供修复：文件是对的。
"""

from doctor.lint.rule import Place, finding, rule
from doctor.lint.testing import tiny

UNREAD = {"exllamav2": ("linear",)}  # runtime -> kinds of scaling that it wants by option


@rule("C159", "info", certainty="likely")
def rope_scale_unread(checkpoint, spec, recipe):
    for key in ("rope_scaling", "rope_parameters"):
        block = spec.config.get(key)
        if not isinstance(block, dict):
            continue
        kind, factor = block.get("rope_type", block.get("type")), block.get("factor")
        if kind in UNREAD.get(recipe.runtime, ()) and isinstance(factor, (int, float)) and factor != 1:
            yield finding(
                f"{key} of type {kind!r} has factor {factor}; {recipe.runtime} does not read it when it converts",
                at=Place("config.json", pointer=spec.at(key)),
                evidence={"factor": factor},
                advice=f"give its converter -rs {factor}",
            )
            return


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    case.config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    return case, "rope_scaling of type 'linear' has factor 4.0; exllamav2 does not read it when it converts"


def good():
    case = tiny()
    case.config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    return case
