"""O612 packed-tensors-incomplete: a packed linear lacks one of its tensors, or their sizes disagree.

Why: qweight without scales cannot be decoded. And where the number of groups in scales does not follow from
in_features and group_size, the config names a group size or a width in bits that the tensors were not made
with: the file loads or decodes wrongly.

Seen as:
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.weight_scale'`
- vLLM: `KeyError: 'model.layers.0.mlp.down_proj.scales'`

Do: copy the missing tensors' shard again; set bits and group_size to what the shapes say.

False alarms: formats with other tensor names are not judged.

Fix safety: no fix: the maker's config is the better source.

Sources: ModelCloud/GPTQModel nn_modules/qlinear/__init__.py; casper-hansen/AutoAWQ
awq/modules/linear/gemm.py.

标题: 打包的线性层缺张量，或尺寸互相矛盾

原因: 只有 qweight 没有 scales 无法解码。scales 的组数若与 in_features 和 group_size 对不上，说明配置写的分组
或位宽不是制作时用的：文件加载不了，或解码出错。

处理: 重新复制缺失张量所在的分片；按形状改正 bits 和 group_size。

误报: 使用其他张量名的格式不作判断。

修复: 不提供修复：制作者的配置更可靠。
"""

from doctor.rule import Place, finding, rule
from doctor.testing import tiny_gptq

NEEDED = {"gptq": ("scales", "qzeros"), "awq": ("scales", "qzeros"), "compressed-tensors": ("weight_scale",)}
PACKED = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}


@rule("O612", "error")
def packed_tensors_incomplete(checkpoint, quantization, layout, tensors):
    for linear in layout.linears:
        at = Place("", tensor=f"{linear.name}.{PACKED[quantization.method]}")
        absent = [tail for tail in NEEDED[quantization.method] if f"{linear.name}.{tail}" not in tensors]
        if quantization.method == "gptq" and quantization.desc_act and f"{linear.name}.g_idx" not in tensors:
            absent.append("g_idx")
        if absent:
            yield finding(
                f"{linear.name} is packed but has no {' and no '.join(absent)}",
                at=at,
                evidence={"absent": absent},
                advice="copy the shard again from where it came from",
            )
            continue
        scales = tensors[f"{linear.name}.{NEEDED[quantization.method][0]}"].shape
        group = linear.in_features if quantization.group_size == -1 else quantization.group_size
        groups, height = -(-linear.in_features // group), linear.out_features
        expected = (height, groups) if quantization.method == "compressed-tensors" else (groups, height)
        if tuple(scales) != expected and quantization.version in (
            "gptq",
            "gptq_v2",
            "gemm",
            "pack-quantized",
        ):
            yield finding(
                f"{linear.name} has scales {list(scales)}, and {quantization.bits} bits in groups of {group} make {list(expected)}",
                at=at,
                evidence={"scales": list(scales), "expected": list(expected)},
                advice="set bits and group_size to what the tensors were made with",
            )


def bad():
    case = tiny_gptq()
    name = case.packed("down")
    del case.tensors[f"{name}.scales"]
    return case, f"{name} is packed but has no scales"


def good():
    return tiny_gptq()
