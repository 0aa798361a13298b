"""Packed linears are judged as the linears that they stand for: layers, names and sizes, in every format."""

import json

import numpy as np
import pytest
from fix_cases import quantized

from doctor.api import check
from doctor.lint.testing import tiny, use_family

INTEGERS = ["gptq", "gptq_v2", "awq", "compressed-tensors"]


def other_format(method, parts):
    """Every linear in a format that is named or not known at all: part -> (shape of [n, k], element type)."""
    case = tiny("llama")
    case.recipe = case.recipe.with_field("goal", "serve")
    rng = np.random.default_rng(3)
    width = {"I32": np.int32, "I16": np.int16, "U8": np.uint8, "F16": np.float16}
    for linear in case.spec.linears:
        del case.tensors[linear.tensor]
        case.dtypes.pop(linear.tensor, None)
        for part, (shape, dtype) in parts(linear.out_features, linear.in_features).items():
            values = rng.uniform(0.01, 0.02, shape) if dtype == "F16" else rng.integers(0, 100, shape)
            values = values.astype(width[dtype])
            name = f"{linear.name}.{part}"
            case.tensors[name], case.dtypes[name] = values.view(np.uint16) if dtype == "F16" else values, dtype
    case.config["quantization_config"] = {"quant_method": method}
    return case


OTHERS = {
    "exl3": lambda n, k: {
        "trellis": ((k // 16, n // 16, 64), "I16"),
        "suh": ((k,), "F16"),
        "svh": ((n,), "F16"),
    },
    "hqq": lambda n, k: {
        "W_q": ((k * n // 128, 64), "U8"),
        "scale": ((n, k // 64), "F16"),
        "zero": ((n, k // 64), "F16"),
    },
    "aqlm": lambda n, k: {
        "codes": ((n, k // 8, 1), "I16"),
        "codebooks": ((1, 256, 1, 8), "F16"),
        "scales": ((n, 1, 1, 1), "F16"),
    },
    "bitnet": lambda n, k: {"weight": ((n // 4, k), "U8"), "weight_scale": ((1,), "F16")},
}


def errors(folder):
    report = check(folder)
    assert not report.crashed, [run.crashed for run in report.crashed]
    return [(f.code, f.message) for f in report.findings if f.severity != "info" and not f.consequence_of]


def restate(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


LAYERS = "num_hidden_layers is 3 in config.json; the files hold 2 decoder layers: model.layers.2 is in no file"


@pytest.mark.parametrize("form", INTEGERS)
def test_a_packed_checkpoint_is_compared_with_what_config_json_counts_and_measures(tmp_path, form):
    _case, folder = quantized(tmp_path / "in", form)
    assert errors(folder) == []
    assert errors(restate(folder, num_hidden_layers=3)) == [("C142", LAYERS)]
    restate(folder, num_hidden_layers=2, intermediate_size=256)
    named = "model.layers.0.mlp.down_proj packed [64, 128]"
    assert errors(folder) == [
        ("F051", f"intermediate_size is 256 in config.json; 6 tensors imply 128, such as {named}")
    ]
    restate(folder, intermediate_size=128, num_key_value_heads=4)
    message = (
        "config.json gives num_key_value_heads * head_dim = 64; model.layers.0.self_attn.k_proj [32, 64] has 32 rows"
    )
    assert errors(folder) == [("C143", message)]


@pytest.mark.parametrize("bits, form", [(3, "gptq"), (3, "compressed-tensors"), (8, "gptq"), (2, "gptq_v2")])
def test_every_width_has_the_size_of_its_linear(tmp_path, bits, form):
    assert errors(quantized(tmp_path / "in", form, bits, sym=form != "compressed-tensors")[1]) == []


@pytest.mark.parametrize("method", OTHERS)
def test_formats_that_are_not_unpacked_are_judged_by_name(tmp_path, method):
    case = other_format(method, OTHERS[method])
    assert errors(case.write(tmp_path / "whole")) == []
    case.config["num_hidden_layers"] = 3
    assert errors(case.write(tmp_path / "short")) == [("C142", LAYERS)]


def test_a_packed_linear_that_is_in_no_file_is_named_as_it_would_be_stored(tmp_path):
    case, _folder = quantized(tmp_path / "in", "gptq")
    for name in [n for n in case.tensors if n.startswith("model.layers.1.mlp.down_proj.")]:
        del case.tensors[name]
    message = "model.layers.1.mlp.down_proj.qweight is in no weight file; 1 of 2 blocks have it"
    assert errors(case.write(tmp_path / "out")) == [("F050", message)]


def test_one_linear_left_in_16_bits_is_no_finding(tmp_path):
    case, _folder = quantized(tmp_path / "in", "gptq")
    for name in [n for n in case.tensors if n.startswith("model.layers.1.mlp.down_proj.")]:
        del case.tensors[name], case.dtypes[name]
    plain = tiny("llama")
    case.tensors["model.layers.1.mlp.down_proj.weight"] = plain.tensors["model.layers.1.mlp.down_proj.weight"]
    assert errors(case.write(tmp_path / "out")) == []


def test_biases_of_zeros_that_packers_of_old_wrote_are_no_finding(tmp_path):
    case, _folder = quantized(tmp_path / "in", "gptq")
    case.config["attention_bias"] = False
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.bias"
        case.tensors[name], case.dtypes[name] = np.zeros(64, np.uint16), "F16"
    assert [e for e in errors(case.write(tmp_path / "out")) if e[0] == "F052"] == []


def test_the_blocks_of_gpt_oss_stand_for_its_fused_experts(tmp_path):
    with use_family("gpt_oss"):
        case = tiny()
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, k, n = case.tensors.pop(name).shape
        case.dtypes.pop(name, None)
        case.tensors[f"{name}_blocks"] = rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8)
        case.tensors[f"{name}_scales"] = rng.integers(110, 122, (experts, n, k // 32), np.uint8)
        case.dtypes |= {f"{name}_blocks": "U8", f"{name}_scales": "U8"}
    case.config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    assert any(n.endswith("_blocks") for n in case.tensors)
    assert errors(case.write(tmp_path / "whole")) == []
    for name in [n for n in case.tensors if n.startswith("model.layers.1.mlp.experts.down_proj_") and "bias" not in n]:
        del case.tensors[name]
    assert [e[0] for e in errors(case.write(tmp_path / "short"))] == ["F050"]


def test_a_note_about_the_format_hides_no_missing_layer(tmp_path):
    from doctor.rules.c147_already_quantized import bad

    case, _message = bad()
    case.recipe = case.recipe.with_field("goal", "serve")
    case.config["num_hidden_layers"] = 3
    found = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code in ("C142", "C147")]
    assert [(f.code, f.severity, f.consequence_of) for f in found] == [("C142", "error", ""), ("C147", "info", "")]
