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
    case = tiny_gptq("llama")
    del case.config["quantization_config"]
    return (
        case,
        "14 tensors are packed (first model.layers.0.mlp.down_proj.qweight) and there is no quantization_config",
    )


def good():
    return tiny_gptq("llama")
