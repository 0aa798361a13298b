"""Checkpoints that other tools packed: bitsandbytes, MLX, AutoRound, DeepSeek. Broken in one way each, and whole."""

import json

import numpy as np
import pytest

from doctor.api import check
from doctor.lint.testing import tiny, tiny_gptq

DOWN = "model.layers.0.mlp.down_proj"


def said(case, folder):
    report = check(case.write(folder), case.recipe)
    assert not report.crashed, [run.crashed for run in report.crashed]
    return [(f.severity, f.code) for f in report.findings if f.severity != "info" and not f.consequence_of]


def put(case, name, values, dtype):
    case.tensors[name], case.dtypes[name] = values, dtype


def drop(case, *names):
    for name in names:
        del case.tensors[name], case.dtypes[name]


def nf4():
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors.pop(linear.tensor).shape
        put(case, linear.tensor, rng.integers(0, 256, (n * k // 2, 1), np.uint8), "U8")
        put(case, f"{linear.tensor}.absmax", rng.uniform(0.02, 0.04, n * k // 64).astype(np.float32), "F32")
        put(case, f"{linear.tensor}.quant_map", np.linspace(-1, 1, 16, dtype=np.float32), "F32")
        state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}).encode()
        put(case, f"{linear.tensor}.quant_state.bitsandbytes__nf4", np.frombuffer(state, np.uint8), "U8")
    case.config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return case


@pytest.mark.parametrize("part", ["", "absmax", "quant_map", "quant_state.bitsandbytes__nf4"])
def test_a_weight_of_bitsandbytes_lacks_a_part(tmp_path, part):
    case = nf4()
    if part:
        drop(case, f"{DOWN}.weight.{part}")
    assert said(case, tmp_path) == ([("error", "O625")] if part else [])


def test_blocks_of_bitsandbytes_are_counted(tmp_path):
    case = nf4()
    name = f"{DOWN}.weight.absmax"
    case.tensors[name] = case.tensors[name][:-1]
    assert said(case, tmp_path) == [("error", "O625")]


def test_a_row_of_bitsandbytes_without_a_scale_is_lost(tmp_path):
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        shape = case.tensors[linear.tensor].shape
        put(case, linear.tensor, rng.integers(-127, 128, shape, np.int8), "I8")
        put(case, f"{linear.name}.SCB", np.full(shape[0], 0.1, np.float32), "F32")
    case.config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert said(case, tmp_path / "whole") == []
    case.tensors[f"{DOWN}.SCB"][3] = 0
    [found] = [f for f in check(case.write(tmp_path / "lost"), case.recipe).findings if f.code == "O607"]
    assert found.message == f"1 of 64 scales in {DOWN}.SCB are 0"
    case.tensors[f"{DOWN}.weight"][3] = 0  # what bitsandbytes writes for a row of zeros
    assert said(case, tmp_path / "zeros") == []


@pytest.mark.parametrize("skipped", [None, ["lm_head"], ["lm_head", DOWN]])
def test_a_plain_linear_of_bitsandbytes_must_be_on_the_list(tmp_path, skipped):
    case = nf4()
    case.config["quantization_config"]["llm_int8_skip_modules"] = skipped
    drop(case, *[name for name in case.tensors if name.startswith(DOWN)])
    put(case, f"{DOWN}.weight", np.random.default_rng(3).integers(0x3C00, 0x3D00, (64, 128), np.uint16), "BF16")
    assert said(case, tmp_path) == ([] if skipped and DOWN in skipped else [("warning", "O623")])


def mlx():
    case, rng = tiny(), np.random.default_rng(3)
    case.recipe = case.recipe.with_field("goal", "")
    for name in [n for n, x in case.tensors.items() if x.ndim == 2]:
        n, k = case.tensors[name].shape
        put(case, name, rng.integers(0, 1 << 32, (n, k // 8), np.uint32), "U32")
        for part in ("scales", "biases"):
            put(case, name.replace("weight", part), rng.integers(0x3000, 0x3100, (n, k // 32)).astype(np.uint16), "F16")
    case.config["quantization"] = {"group_size": 32, "bits": 4}
    return case


def test_a_model_of_mlx_is_served_as_it_is(tmp_path):
    assert said(mlx(), tmp_path) == []


def test_the_two_blocks_of_an_mlx_model_agree(tmp_path):
    case = mlx()
    case.config["quantization"][DOWN] = {"group_size": 32, "bits": 4}
    case.config["quantization_config"] = dict(case.config["quantization"])
    assert said(case, tmp_path / "same") == []
    case.config["quantization_config"] = {"group_size": 64, "bits": 4}
    [found] = [f for f in check(case.write(tmp_path / "apart"), case.recipe).findings if f.code == "O654"]
    assert found.message == (
        "2 keys differ between quantization and quantization_config (first group_size: 32 and 64): mlx-lm reads "
        "quantization"
    )


def test_a_plain_linear_of_mlx_has_no_scales(tmp_path):
    case = mlx()
    n, words = case.tensors[f"{DOWN}.weight"].shape
    drop(case, f"{DOWN}.scales", f"{DOWN}.biases")
    values = np.random.default_rng(3).integers(0x2000, 0x2800, (n, words * 8)).astype(np.uint16)
    put(case, f"{DOWN}.weight", values, "F16")
    case.config["quantization"][DOWN] = False
    assert said(case, tmp_path) == []


def test_codes_beside_scales_without_a_config_are_named_once(tmp_path):
    case = mlx()
    del case.config["quantization"]
    assert said(case, tmp_path / "mlx") == [("error", "O611")]
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        put(case, linear.tensor, rng.integers(1, 0x78, (n, k), np.uint8), "F8_E4M3")
        put(case, f"{linear.tensor}_scale_inv", np.full((-(-n // 128), -(-k // 128)), 0.001, np.float32), "F32")
    assert said(case, tmp_path / "fp8") == [("error", "O611")]


def autoround(plain):
    case = tiny_gptq()
    for name in [n for n in case.tensors if n.endswith(".g_idx")]:
        drop(case, name)
    if plain:
        columns, rows = case.tensors[f"{DOWN}.qweight"].shape
        drop(case, *(f"{DOWN}.{part}" for part in ("qweight", "qzeros", "scales")))
        values = np.random.default_rng(3).integers(0x2000, 0x2800, (rows, columns * 8)).astype(np.uint16)
        put(case, f"{DOWN}.weight", values, "F16")
    case.config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    }
    return case


@pytest.mark.parametrize("entry", [DOWN, r".*layers\.0\.mlp\.down_proj"])
@pytest.mark.parametrize("plain, listed", [(True, True), (True, False), (False, True), (False, False)])
def test_extra_config_of_autoround_is_its_exclude_list(tmp_path, plain, listed, entry):
    case = autoround(plain)
    if listed:
        case.config["quantization_config"]["extra_config"] = {entry: {"bits": 16, "data_type": "float"}}
    found = [severity for severity, code in said(case, tmp_path) if code == "O623"]
    assert found == ([] if plain == listed else ["warning"] if plain else ["error"])


def test_a_factor_stored_as_divisor_is_too_large(tmp_path):
    case = tiny()
    put(case, f"{DOWN}.weight_scale_2", np.array(26_000, np.float32), "F32")
    assert ("warning", "O607") in said(case, tmp_path)
