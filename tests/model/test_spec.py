import pytest

from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.lint.testing import FAMILIES, tiny
from doctor.model.spec import build_spec, evaluate


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_healthy_family_has_the_shape_its_config_gives(family):
    case = tiny(family)
    spec = build_spec(case.config, case.infos())
    assert spec.family == family and spec.linears and spec.embed_tensor
    for name, info in case.infos().items():
        assert spec.expected_shape(name) in (None, info.shape), name
    assert {x.block for x in spec.linears} == {0, 1}


def info(name, *shape):
    return TensorInfo(name, DTYPES["BF16"], shape, "m", 0, 0)


def test_multimodal_config_is_read_at_its_text_block_and_vision_is_left_out():
    config = {
        "model_type": "qwen2_vl",
        "architectures": ["X"],
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 96,
        },
    }
    names = {
        n: info(n, 128, 64)
        for n in ("model.language_model.layers.0.mlp.up_proj.weight", "model.visual.blocks.0.mlp.up_proj.weight")
    }
    spec = build_spec(config, names)
    assert [x.name for x in spec.linears] == ["model.language_model.layers.0.mlp.up_proj"]
    assert spec.prefix == "model.language_model." and spec.at("hidden_size") == "/text_config/hidden_size"


def test_an_unknown_family_is_read_by_the_shape_of_its_tensors():
    names = {
        n: info(n, 64, 64)
        for n in (
            "net.layer.3.attn.q_proj.weight",
            "net.layer.3.norm.weight",
            "net.embed.weight",
            "net.layer.3.mlp.gate.weight",
        )
    }
    spec = build_spec({"model_type": "nobody"}, names)
    assert spec.family is None and [(x.name, x.role, x.block) for x in spec.linears] == [
        ("net.layer.3.attn.q_proj", "q", 3)
    ]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": "64"},
        {"hidden_size": -1, "num_attention_heads": 0},
        {"architectures": 3},
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0},
        {"text_config": [], "model_type": None},
        {"model_type": "llama", "num_hidden_layers": 1e9, "vocab_size": True},
    ],
)
def test_odd_configs_never_raise_and_unusable_values_are_none(config):
    spec = build_spec(config, {})
    assert spec.hidden in (None, 64) and spec.vocab is None


def test_expressions_know_arithmetic_and_nothing_else():
    names = {"a": 6, "b": 4}
    assert evaluate("2 * a + (b - 1) // 3", names.get) == 13
    for bad in ("a.b", "c", "a ** b", "__import__('os')", "a //0", "1 +", "a if a else b"):
        assert evaluate(bad, names.get) is None


def test_what_steers_a_state_space_models_step_is_no_linear_to_quantize():
    mixer = "backbone.layers.0.mixer"
    names = {
        n: info(n, *shape)
        for n, shape in (
            (f"{mixer}.in_proj.weight", (5120, 1280)),
            (f"{mixer}.x_proj.weight", (112, 2560)),
            (f"{mixer}.dt_proj.weight", (2560, 80)),
            (f"{mixer}.out_proj.weight", (1280, 2560)),
        )
    }
    spec = build_spec({"model_type": "mamba"}, names)
    assert [x.name for x in spec.linears] == [f"{mixer}.in_proj", f"{mixer}.out_proj"]


def test_a_matrix_inside_a_norm_or_narrower_than_a_word_of_weights_is_no_linear():
    names = {
        n: info(n, *shape)
        for n, shape in (
            ("m.layers.0.input_layernorm.W_up.weight", (128, 64)),
            ("m.layers.0.lora_a.weight", (16, 128)),
            ("m.layers.0.norm_attn_norm.attn.Wqkv.weight", (128, 64)),
        )
    }
    assert [x.name for x in build_spec({"model_type": "nobody"}, names).linears] == [
        "m.layers.0.norm_attn_norm.attn.Wqkv"
    ]
