"""FP8 blocks under tensor parallelism: the same refusals as vLLM's own check, at every number of GPUs."""

import numpy as np
import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.engine import load_rules
from doctor.lint.explain import search
from doctor.lint.testing import tiny

TPS = (1, 2, 3, 4, 5, 6, 8, 12, 16)


def blocked(family="llama", mlp=192, block=32, style="fp8", **config):
    """Every projection in 8-bit floats with one scale a block."""
    case = tiny(family, mlp=mlp)
    for name in [n for n in case.tensors if n.endswith("_proj.weight")]:
        rows, columns = case.tensors[name].shape
        scale = name + ("_scale_inv" if style == "fp8" else "_scale")
        case.tensors[name] = np.random.default_rng(3).integers(1, 0x78, (rows, columns), np.uint8)
        case.tensors[scale] = np.full((-(-rows // block), -(-columns // block)), 0.01, np.float32)
        case.dtypes |= {name: "F8_E4M3", scale: "F32"}
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [block, block]}
    case.config["quantization_config"] = (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
        if style == "fp8"
        else {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    )
    case.config.update(config)
    return case


def vllm_refuses(case, tp, block):
    """validate_fp8_block_shape of every matrix that vLLM makes of a decoder layer, restated from its inputs."""
    config = case.config
    heads, kv, width = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_here = max(1, kv // tp)
    layers = [
        (hidden, (heads + 2 * kv_here * tp) * width, hidden, [heads // tp * width, kv_here * width, kv_here * width]),
        (heads * width, hidden, heads * width // tp, [hidden]),
        (hidden, 2 * inner, hidden, [inner // tp, inner // tp]),
        (inner, hidden, inner // tp, [hidden]),
    ]
    for input_size, output_size, input_here, parts in layers:
        if tp > 1 and input_size // input_here == tp and input_here % block:
            return True
        split = tp > 1 and output_size // sum(parts) == tp
        if (split or len(parts) > 1) and any(part % block for part in (parts if split else parts[:-1])):
            return True
    return False


@pytest.mark.parametrize("style", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("mlp", [192, 256, 384])
@pytest.mark.parametrize("block", [16, 32])
def test_refused_where_vllm_refuses(tmp_path, style, mlp, block):
    case = blocked(mlp=mlp, block=block, style=style)
    folder = case.write(tmp_path)
    for tp in TPS:
        report = check(folder, Recipe(group_size=32, tp=tp, runtime="vllm"), stage="header")
        found = [f for f in report.findings if f.code == "G320"]
        if case.config["num_attention_heads"] % tp or mlp % tp:  # vLLM's own divisions stop before this check
            assert any(f.code in ("G304", "G320") for f in report.findings), tp
        else:
            assert bool(found) == vllm_refuses(case, tp, block), (tp, [f.message for f in found])


def test_message_names_the_key_the_block_and_the_counts_that_fit(tmp_path):
    case = blocked(mlp=192, block=16)
    folder = case.write(tmp_path)
    report = check(folder, Recipe(group_size=32, tp=8, runtime="vllm"), stage="header")
    [found] = [f for f in report.findings if f.code == "G320" and f.evidence["size"] == 192]
    assert found.message == (
        "intermediate_size 192 on 8 GPUs leaves 24 for gate, up and down: not a multiple of the block of 16"
    )
    assert ("tensor parallel that fits", "1, 2, 3, 4, 6, 12") in found.facts_table
    assert found.where.pointer == "/intermediate_size"


@pytest.mark.parametrize("runtime", ["transformers", "llama.cpp"])
def test_other_runtimes_are_not_judged(tmp_path, runtime):
    report = check(blocked().write(tmp_path), Recipe(group_size=32, tp=4, runtime=runtime), stage="header")
    [run] = [r for r in report.runs if r.rule.code == "G320"]
    assert run.status == "skipped" and "G320" not in {f.code for f in report.findings}


@pytest.mark.parametrize(
    ("runtime", "version", "tp", "severity"),
    [
        ("vllm", "0.20.0", 1, "error"),
        ("sglang", "", 1, "error"),
        ("vllm", "0.31.0", 2, "warning"),
        ("vllm", "", 2, "warning"),
        ("", "", 2, "warning"),
        ("", "", 1, None),
    ],
)
def test_experts_are_judged_on_one_gpu_too_where_a_runtime_is_named(tmp_path, runtime, version, tp, severity):
    recipe = Recipe(group_size=32, runtime=runtime, runtime_version=version, tp=tp)
    report = check(blocked("qwen3_moe", mlp=48, block=32).write(tmp_path), recipe, stage="header")
    found = [f for f in report.findings if f.code == "G320" and f.where.pointer == "/moe_intermediate_size"]
    assert {f.severity for f in found} == ({severity} if severity else set())
    assert all("expert parallelism" in f.advice for f in found)


def test_pasted_message_leads_to_the_rule():
    text = "ValueError: Weight output_partition_size = 96 is not divisible by weight quantization block_n = 128."
    assert search(text, load_rules())[0].rule.code == "G320"
