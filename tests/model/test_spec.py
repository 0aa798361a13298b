import pytest
from healthy_models import save

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.recipe import Recipe
from doctor.lint.testing import FAMILIES, tiny
from doctor.model.expressions import evaluate
from doctor.model.spec import build_spec


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


ATTENTION = {"q", "k", "v", "o"}
LINEAR_ATTENTION = {"linear_attn_in", "linear_attn_out"}


@pytest.mark.parametrize(
    "model_type, attention, others",
    [
        ("qwen3_next", [3], [0, 1, 2]),
        ("qwen3_5_text", [3], [0, 1, 2]),
        ("lfm2", [1], [0, 2]),
        ("jamba", [3], [0, 1, 2]),
    ],
)
def test_a_hybrid_lists_the_linears_of_every_kind_of_layer(model_type, attention, others, tmp_path):
    spec = spec_of(save(model_type, tmp_path))
    roles = {i: {x.role for x in spec.linears if x.block == i} for i in (*attention, *others)}
    assert all(roles[i] >= ATTENTION and not roles[i] & LINEAR_ATTENTION for i in attention)
    assert all(roles[i] >= LINEAR_ATTENTION and not roles[i] & ATTENTION for i in others)
    assert all(roles[i] >= {"gate", "up", "down"} for i in roles)


def test_the_kind_of_a_layer_follows_the_key_that_a_config_has(tmp_path):
    """Qwen3-Next is published with an interval, transformers 5 writes the list; Nemotron-H has a letter a layer."""
    for config in ({"layer_types": [*["linear_attention"] * 3, "full_attention"]}, {"full_attention_interval": 4}, {}):
        spec = build_spec({"model_type": "qwen3_next"} | config, {})
        assert [spec.in_layer("full_attention", i) for i in range(4)] == [False, False, False, True]
    spec = build_spec({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*E"}, {})
    assert spec.n_layers == 4 and [spec.in_layer("mlp", i) for i in range(4)] == [False, True, False, False]
    assert build_spec({"model_type": "nemotron_h"}, {}).in_layer("mlp", 0) is None


def spec_of(folder):
    checkpoint = Checkpoint.open(folder)
    return build_spec(checkpoint.value("config.json"), checkpoint.tensors)


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "nobody"])
def test_linears_of_multi_token_prediction_are_not_those_of_layer_0(model_type):
    tails = ("self_attn.q_proj", "mlp.up_proj")
    names = [f"{stem}layers.{0}.{tail}.weight" for stem in ("mtp.", "model.") for tail in tails]
    spec = build_spec({"model_type": model_type}, {n: info(n, 64, 64) for n in names})
    assert {x.name: x.block for x in spec.linears} == {
        **{f"mtp.layers.0.{tail}": None for tail in tails},
        **{f"model.layers.0.{tail}": 0 for tail in tails},
    }
    assert spec.prefix == ("model." if spec.family else "")


def test_sizes_that_differ_between_kinds_of_layers_are_those_of_the_layers_kind():
    config = {"model_type": "mimo_v2_flash", "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}
    key = "model.layers.{}.self_attn.k_proj.weight"
    spec = build_spec(config | {"layer_types": ["full_attention", "sliding_attention"]}, {})
    assert [spec.expected_shape(key.format(i)) for i in (0, 1)] == [(64, 64), (128, 64)]
    assert build_spec(config, {}).expected_shape(key.format(0)) is None, "config.json does not say which it is"


def test_an_omni_models_text_is_its_thinkers(tmp_path):
    """The talker has an embedding and linears of the same names; the thinker's own tie counts, not its text part's."""
    text = {"model_type": "qwen2_5_omni_text", "num_hidden_layers": 2, "tie_word_embeddings": True}
    thinker = {"model_type": "qwen2_5_omni_thinker", "tie_word_embeddings": False, "text_config": text}
    config = {
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker", "num_hidden_layers": 1},
    }
    case = tiny("qwen2")
    names = [f"{part}.{n}" for part in ("talker", "thinker") for n in case.infos()]
    infos = {n: case.infos()[n.partition(".")[2]]._replace(name=n) for n in names}
    spec = build_spec(config, infos)
    assert spec.text_key == "thinker_config/text_config" and spec.n_layers == 2
    assert spec.at("hidden_size") == "/thinker_config/text_config/hidden_size" and spec.section(config) == text
    assert spec.tie_stated is False and spec.embed_tensor == "thinker.model.embed_tokens.weight"
    assert spec.linears and all(x.name.startswith("thinker.") for x in spec.linears)


def test_a_matrix_that_no_template_names_is_a_linear_by_its_shape():
    """A family's table may lack a linear that a release of it has; norms, gates and narrow matrices are none."""
    case = tiny("llama")
    infos = dict(case.infos())
    like = infos["model.layers.0.self_attn.q_proj.weight"]
    for name in (
        "model.layers.0.self_attn.g_proj.weight",
        "model.layers.0.router.weight",
        "extra.layers.0.proj.weight",
    ):
        infos[name] = like._replace(name=name)
    known = {x.name for x in build_spec(case.config, case.infos()).linears}
    assert {x.name for x in build_spec(case.config, infos).linears} - known == {"model.layers.0.self_attn.g_proj"}


def test_experts_stored_one_by_one_need_no_table():
    names = {
        f"model.layers.1.mlp.experts.{e}.{r}_proj.weight": (e, r) for e in range(3) for r in ("gate", "up", "down")
    }
    like = tiny("llama").infos()["model.layers.0.self_attn.q_proj.weight"]
    spec = build_spec({"model_type": "nobody_knows"}, {n: like._replace(name=n) for n in names})
    assert {x.tensor: (x.expert, x.role) for x in spec.linears} == names and {x.block for x in spec.linears} == {1}


def test_layers_that_are_listed_as_two_are_counted_as_transformers_counts_them():
    """Dory's own config.json, as transformers 5.24 writes it for a model of two layers."""
    kinds = ["sliding_attention", "mlp", "full_attention", "mlp"]
    found = build_spec({"model_type": "dory", "num_hidden_layers": 4, "n_input_layers": 2, "layer_types": kinds}, {})
    assert found.n_layers == 2 and found.config["n_input_layers"] == 1
    assert found.config["layer_types"] == ["sliding_attention", "full_attention"]
    other = build_spec({"num_hidden_layers": 4, "layer_types": ["mamba", "mlp", "mlp", "mamba"]}, {})
    assert other.n_layers == 4


def test_no_message_says_the_role_of_a_layer_with_a_state_but_its_linear_s_name(tmp_path):
    folder = save("falcon_h1", tmp_path)
    found = check(folder, Recipe(group_size=48), stage="header").findings
    said = " ".join(f"{f.message} {f.advice} {f.fix.title if f.fix else ''}" for f in found)
    assert "in_proj" in said and "linear_attn" not in said
