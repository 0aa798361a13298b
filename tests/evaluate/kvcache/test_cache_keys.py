"""rules/tables/cache_keys.toml: what it says of a family is what transformers' own config class says."""

import pytest

from doctor.core.tables import table
from doctor.evaluate.kvcache import layer_sizes
from doctor.evaluate.kvcache.layer_sizes import read_cache_layout
from doctor.model.spec import build_spec

pytest.importorskip("transformers")
KEYS = table("cache_keys")
USUAL = ("model_type", "num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads")


def default(model_type: str) -> dict:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]().to_dict()


def read(config: dict, monkeypatch, by_keys: bool):
    """The layers, by the keys of config.json or by transformers' class."""
    monkeypatch.setattr(layer_sizes, "read_by_keys", lambda spec: by_keys)
    return read_cache_layout(build_spec(config, {})).layers


@pytest.mark.parametrize("model_type", [*KEYS["alone"], *KEYS["stated"], *KEYS["typed"]])
def test_the_keys_of_a_listed_family_say_what_its_class_says(model_type, monkeypatch):
    whole = default(model_type)
    if model_type not in KEYS["typed"]:
        whole.pop("layer_types", None)
    assert read(whole, monkeypatch, True) == read(whole, monkeypatch, False)


@pytest.mark.parametrize("model_type", [*KEYS["alone"], *KEYS["stated"]])
def test_so_does_a_config_that_states_little(model_type, monkeypatch):
    whole = default(model_type)
    few = {key: whole[key] for key in (*USUAL, *HEADS, *KEYS["stated"].get(model_type, ())) if key in whole}
    assert read(few, monkeypatch, True) == read(few, monkeypatch, False)


@pytest.mark.parametrize(
    "model_type, more, by_keys",
    [
        ("llama", {}, True),
        ("deepseek_v3", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, True),
        ("deepseek_v3", {}, False),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2}, True),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, False),  # the window is the class's
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 512}, True),
        ("gemma3_text", {"layer_types": ["full_attention"]}, False),
        ("gemma3_text", {}, False),
        ("jamba", {}, False),
    ],
)
def test_keys_are_enough_where_the_table_and_config_json_say_so(model_type, more, by_keys):
    config = {"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, **more}
    assert layer_sizes.read_by_keys(build_spec(config, {})) is by_keys
