"""O611 quantization-config-missing: tensors are packed, but no file says how.

Why: bits, group size and zero points cannot be read off the words with certainty. Engines take such a
checkpoint for an unquantized one and look for weights that are not there.

Seen as:
- vLLM: `Cannot find the config file for gptq`
- transformers: `Some weights of the model checkpoint were not used`

Do: copy quantize_config.json from where the model came from, or write the quantization_config that its
maker used.

False alarms: none; without it no engine reads the file.

Fix safety: no fix: symmetry and version are not in the tensors.

Sources: vllm-project/vllm issues 1100 and 13612; vllm-project/llm-compressor issues 959 and 967.

标题: 张量是打包的，却没有文件说明如何打包

原因: 位宽、分组大小和零点无法从打包的字里确定。引擎会把它当成未量化的检查点，去找并不存在的权重。

处理: 从模型来源处复制 quantize_config.json，或写上制作者使用的 quantization_config。

误报: 无；没有它，任何引擎都读不了。

修复: 不提供修复：对称性和版本不在张量里。
"""

from doctor.rule import Place, finding, rule
from doctor.testing import tiny_gptq

PACKED = (".qweight", ".weight_packed", ".q_weight")


@rule("O611", "error")
def quantization_config_missing(checkpoint, quantization_block, tensors):
    packed = [name for name in tensors if name.endswith(PACKED)]
    if quantization_block is not None or not packed:
        return
    yield finding(
        f"{len(packed):,} tensors are packed (first {packed[0]}) and there is no quantization_config",
        at=Place("config.json", pointer="/quantization_config"),
        evidence={"packed": len(packed)},
        advice="copy quantize_config.json from where the model came from",
    )


def bad():
    case = tiny_gptq()
    del case.config["quantization_config"]
    return (
        case,
        "14 tensors are packed (first model.layers.0.mlp.down_proj.qweight) and there is no quantization_config",
    )


def good():
    return tiny_gptq()
