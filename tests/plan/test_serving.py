"""What releases of vLLM read, as the tables `stored` and `served` have it from their sources."""

import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny, tiny_gptq
from doctor.plan.serving import least_capability, reads_method, schemes, serves, stated

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("version", "method", "answer"),
    [
        ("0.6.3", "bitsandbytes", True),
        ("0.28.0", "bitsandbytes", False),
        ("0.26.0", "bitsandbytes", None),  # it left between two releases that were read
        ("0.6.3", "mxfp4", False),
        ("0.10.1", "mxfp4", None),
        ("0.12.0", "mxfp4", True),
        ("0.13.0", "mxfp4", True),  # before and after have it
        ("0.4.0", "compressed-tensors", False),
        ("0.2.0", "gptq", None),  # older than the first that was read
        ("", "gptq", True),
        ("0.33.0", "bitsandbytes", False),
    ],
)
def test_a_release_reads_a_method_as_its_neighbours_that_were_read_do(version, method, answer):
    assert reads_method("vllm", version, method) is answer


@pytest.mark.parametrize(
    ("version", "weights", "inputs", "form", "answer"),
    [
        ("0.6.3", INT4, None, "pack-quantized", True),
        ("0.6.3", INT4 | {"symmetric": False}, None, "pack-quantized", False),
        ("0.8.5", INT4 | {"symmetric": False}, None, "pack-quantized", True),
        ("0.8.0", INT4 | {"symmetric": False}, None, "pack-quantized", True),  # not known: no finding
        ("0.20.0", INT4 | {"num_bits": 3}, None, "pack-quantized", False),
        ("", INT4 | {"num_bits": 3}, None, "pack-quantized", True),
        ("0.8.5", NVFP4, None, "nvfp4-pack-quantized", False),
        ("0.9.2", NVFP4, NVFP4, "nvfp4-pack-quantized", True),
        ("0.10.2", BLOCKS, TOKENS, "float-quantized", False),
        ("0.11.2", BLOCKS, TOKENS, "float-quantized", True),
    ],
)
def test_a_release_computes_with_a_scheme_from_the_first_that_was_read_with_it(version, weights, inputs, form, answer):
    rows = schemes("vllm", version)
    assert any(serves(row, stated(weights), stated(inputs), form) for row in rows) is answer


def test_a_release_older_than_all_that_were_read_is_not_judged():
    assert schemes("vllm", "0.5.0") is None and schemes("sglang", "") is None


@pytest.mark.parametrize(
    ("version", "raw", "least"),
    [
        ("0.10.2", {"config_groups": {"g": {"weights": INT4}}, "format": "pack-quantized"}, 80),
        ("0.14.1", {"config_groups": {"g": {"weights": INT4}}, "format": "pack-quantized"}, 75),
        ("0.12.0", {"quant_method": "fp8"}, 80),
        ("", {"quant_method": "fp8"}, 75),
        ("", {"quant_method": "awq"}, 75),
        ("", {"quant_method": ["odd"]}, 0),
    ],
)
def test_the_least_gpu_is_that_of_the_release(version, raw, least):
    assert least_capability(Recipe(runtime="vllm", runtime_version=version), raw) == least


def test_an_old_release_that_lacks_a_reader_is_told_which_one_has_it(tmp_path):
    case = tiny()
    case.config["quantization_config"] = {"quant_method": "mxfp4"}
    path = case.write(tmp_path / "model")
    report = check(path, Recipe(goal="serve", runtime="vllm", runtime_version="0.6.3"), select=["G331"])
    [found] = report.findings
    assert found.message == ("vllm 0.6.3 has no reader for quant_method mxfp4; vllm 0.10.2 and transformers have one")


def test_the_serving_line_names_the_least_gpu(tmp_path):
    path = tiny_gptq().write(tmp_path / "q4")
    assert check(path, Recipe(goal="serve", runtime="vllm")).summary["capability"] == "6.0"
    assert check(path, Recipe(goal="serve")).summary["capability"] == ""
