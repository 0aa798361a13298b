"""O619 fused-experts-packed: experts are packed as fused 3-D tensors, which no engine loads.

Why: engines look for packed experts one linear at a time (`experts.0.gate_proj.weight_packed`). A quantizer that takes
the fused parameter for one linear writes `experts.gate_up_proj_packed` for all experts together. No engine has a
parameter of this name: the file loads without an error, the experts keep random numbers, and the reply is garbage.

Seen as:
- transformers: `Some weights of the model checkpoint at`

Do: quantize the original again with a tool that splits the experts into linears first: `doctor quantize`, or
llm-compressor newer than 0.12.

False alarms: an engine with code of its own for these names. MXFP4 experts (`*_blocks`) and 8-bit or NVFP4 experts under
the fused names are read by vLLM and are not reported.

Fix safety: no fix: the codes were chosen along the fused axis; quantize again from the original.

Sources: vllm-project/llm-compressor issue 2939 (MMLU 82.2 to 24.7) and pull requests 2847 and 2848; vllm-project/vllm
vllm/model_executor/models/qwen3_5.py (load_weights).
"""

import re

from doctor.lint.rule import Fix, Place, _, finding, packs_fused_experts, plural, ranges, rule
from doctor.lint.testing import np, only_in, tiny

LAYER = re.compile(r"\.(\d+)\.")


@rule("O619", "error", implied_by=("F005",))
def fused_experts_packed(checkpoint, tensors, spec):
    found = {name: info for name, info in tensors.items() if packs_fused_experts(name, info.shape)}
    if not found:
        return
    first = min(found)
    layers = [int(match[1]) for name in found if (match := LAYER.search(name))]
    experts = found[first].shape[0]
    parent, _mark, role = first.removesuffix("_packed").rpartition(".")
    single = "gate_proj" if "gate" in role else role
    yield finding(
        plural(
            "{first} holds {experts:,} packed experts in one tensor, which no engine loads",
            "{n:,} tensors hold packed experts fused, {experts:,} in each, which no engine loads (first {first})",
            len(found),
            first=first,
            experts=experts,
        ),
        at=Place(found[first].shard, tensor=first),
        evidence={"tensors": len(found), "experts": experts, "names": sorted(found)[:100]},
        facts_table=(
            (_("stored"), f"{first} {list(found[first].shape)}"),
            (_("engines look for"), f"{parent}.0.{single}.weight_packed"),
            (_("decoder layers"), ranges(layers) if layers else "-"),
        ),
        fix=Fix(_("quantize the original again with each expert as linears of its own"), (), "manual"),
    )


def bad():
    case = tiny(only_in("qwen3_moe", "qwen2_moe", "olmoe", why="the example fuses this family's experts"))
    for layer in range(2):
        parent = f"model.layers.{layer}.mlp.experts"
        for name in [n for n in case.tensors if n.startswith(parent + ".")]:
            del case.tensors[name]
        for role, rows, columns in (("gate_up_proj", 128, 64), ("down_proj", 64, 64)):
            rng = np.random.default_rng(layer)
            words = rng.integers(-(1 << 31), 1 << 31, (4, rows, columns // 8), np.int64).astype(np.int32)
            name = f"{parent}.{role}"
            case.tensors |= {
                f"{name}_packed": words,
                f"{name}_scale": rng.uniform(0.01, 0.02, (4, rows, columns // 32)).astype(np.float32),
                f"{name}_shape": np.array([4, rows, columns], np.int64),
            }
            case.dtypes |= {f"{name}_packed": "I32", f"{name}_scale": "F32", f"{name}_shape": "I64"}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_expert.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    }
    return case, (
        "4 tensors hold packed experts fused, 4 in each, which no engine loads "
        "(first model.layers.0.mlp.experts.down_proj_packed)"
    )


def good():
    return tiny(only_in("qwen3_moe", "qwen2_moe", "olmoe", why="the example fuses this family's experts"))
