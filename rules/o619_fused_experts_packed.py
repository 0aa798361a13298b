"""O619 fused-experts-packed: experts are packed as fused 3-D tensors, which transformers does not load.

Why: readers look for packed experts one linear at a time (`experts.0.gate_proj.weight_packed`). A quantizer that takes
the fused parameter for one linear writes `experts.gate_up_proj_packed` for all experts together. transformers has no
parameter of this name: the file loads without an error, the experts keep random numbers, and the reply is garbage, as
in older vLLM. vLLM 0.32 cuts such stacks, and computes what it computes of single experts; only a `_shape` of three
sizes, where it has room for two, stops its load.

Seen as:
- transformers: `Some weights of the model checkpoint at`

Do: quantize the original again with a tool that splits the experts into linears first: `doctor quantize`, or
llm-compressor newer than 0.12. For vLLM 0.32 alone, leave out the stacks' `_shape`.

False alarms: an engine with code of its own for these names. MXFP4 experts (`*_blocks`) and 8-bit or NVFP4 experts under
the fused names are read by vLLM and are not reported.

Fix safety: manual: without `_shape` vLLM reads the file, and no other reader does.

Sources: vllm-project/llm-compressor issue 2939 (MMLU 82.2 to 24.7) and pull requests 2847 and 2848; vllm-project/vllm
0.32 vllm/model_executor/layers/fused_moe/routed_experts.py (load_weights, _load_single_value).
"""

import re

from doctor.lint.rule import (
    Fix,
    Place,
    _,
    finding,
    packs_fused_experts,
    plural,
    ranges,
    rule,
    version_before,
)
from doctor.lint.testing import np, only_in, tiny

LAYER = re.compile(r"\.(\d+)\.")
CUTS_STACKS = "0.32"  # the first vLLM that was seen to; older ones were not tried


@rule("O619", "error", implied_by=("F005",))
def fused_experts_packed(checkpoint, tensors, spec, recipe):
    found = {name: info for name, info in tensors.items() if packs_fused_experts(name, info.shape)}
    if not found:
        return
    first = min(found)
    shapes = [
        name
        for name in sorted(f"{stack.removesuffix('_packed')}_shape" for stack in found)
        if name in tensors and tuple(tensors[name].shape) == (3,)
    ]
    old = recipe.runtime_version and version_before(recipe.runtime_version, CUTS_STACKS)
    if recipe.runtime == "vllm" and not old:
        yield _for_vllm(found, first, shapes, tensors)
        return
    layers = [int(match[1]) for name in found if (match := LAYER.search(name))]
    experts = found[first].shape[0]
    parent, _mark, role = first.removesuffix("_packed").rpartition(".")
    single = "gate_proj" if "gate" in role else role
    yield finding(
        plural(
            "{first} holds {experts:,} packed experts in one tensor, which transformers does not load",
            "{n:,} tensors hold packed experts fused, {experts:,} in each, which transformers does not load "
            "(first {first})",
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


def _for_vllm(found, first, shapes, tensors):
    """vLLM cuts the stacks, but takes no shape of three sizes."""
    if not shapes:
        return finding(
            plural(
                "{first} holds packed experts in one tensor, which vLLM cuts and transformers does not load",
                "{n:,} tensors hold packed experts fused, which vLLM cuts and transformers does not load (first {first})",
                len(found),
                first=first,
            ),
            at=Place(found[first].shard, tensor=first),
            severity="warning",
            evidence={"tensors": len(found), "names": sorted(found)[:100]},
            advice=_("quantize the original again with each expert as linears of its own, for other readers"),
        )
    return finding(
        plural(
            "{first} states three sizes of a stack of packed experts; vLLM has room for two and stops",
            "{n:,} tensors state three sizes of stacks of packed experts, first {first}; vLLM has room for two and stops",
            len(shapes),
            first=shapes[0],
        ),
        at=Place(tensors[shapes[0]].shard, tensor=shapes[0]),
        evidence={"tensors": len(shapes), "names": shapes[:100]},
        fix=Fix(_("quantize the original again with each expert as linears of its own"), (), "manual"),
        advice=_("vLLM loads the stacks where the tensors of their sizes are left out"),
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
        "4 tensors hold packed experts fused, 4 in each, which transformers does not load "
        "(first model.layers.0.mlp.experts.down_proj_packed)"
    )


def good():
    return tiny(only_in("qwen3_moe", "qwen2_moe", "olmoe", why="the example fuses this family's experts"))
