"""config.json in the keys of both generations of readers."""

import json

import pytest

from doctor.api import check, fix, quantize
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.model.spellings import old_keys, with_old_keys

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0}


@pytest.mark.parametrize(
    "config, added",
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        (
            {"rope_parameters": LLAMA3},
            {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        ({"rope_parameters": LLAMA3, "rope_theta": 1.0, "rope_scaling": {"type": "linear"}}, {}),
        ({"rope_parameters": {"full_attention": LLAMA3}}, {}),  # one for each layer type
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": LLAMA3, "sliding_attention": {"rope_theta": 20000.0}},
            },
            {
                "rope_theta": 500000.0,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
                "rope_local_base_freq": 20000.0,
            },
        ),
        ({"rope_parameters": {"rope_theta": True}}, {}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {}),
        ({"rope_theta": 1e6}, {}),
        ({"rope_parameters": [1], "dtype": None}, {}),
    ],
)
def test_what_older_readers_lack_is_added_and_nothing_changed(config, added):
    assert old_keys(config) == added
    assert with_old_keys(config) == {**config, **added}


def test_a_text_section_gets_its_own():
    config = {"dtype": "bfloat16", "text_config": {"rope_parameters": LLAMA3}, "vision_config": {"dtype": "bfloat16"}}
    both = with_old_keys(config)
    assert both["torch_dtype"] == "bfloat16" and both["text_config"]["rope_theta"] == 500000.0
    assert both["vision_config"] == {"dtype": "bfloat16"} and "rope_theta" not in both


def new_style(tmp_path):
    case = tiny()
    for key in ("rope_theta", "torch_dtype"):
        case.config.pop(key, None)
    case.config.update(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, dtype="bfloat16")
    return case.write(tmp_path / "new")


def test_a_quantized_model_is_read_by_both_generations(tmp_path):
    quantize(new_style(tmp_path), tmp_path / "q", Recipe(method="rtn", group_size=32), client=None)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_fix_for_older_readers_writes_their_keys_and_judges_nothing_else(tmp_path):
    from click.testing import CliRunner

    from doctor.cli.main import cli

    source = new_style(tmp_path)
    ran = CliRunner().invoke(cli, ["fix", str(source), "-o", str(tmp_path / "out"), "--for-readers", "transformers4"])
    assert ran.exit_code == 0, ran.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 500000.0 and config["torch_dtype"] == "bfloat16"
    assert not fix(tmp_path / "out", tmp_path / "again", only=["C160", "C168"], dry_run=True).plan.steps


@pytest.mark.parametrize(
    "whole, sliding, says",
    [
        ({"rope_type": "linear", "factor": 8.0}, 10000.0, "rope scaling linear is stated only in rope_parameters"),
        ({}, 20000.0, "the base 20000.0 of layers with a sliding window is stated only in rope_parameters"),
        ({}, 10000.0, None),
    ],
)
def test_what_gemma_3_states_for_each_kind_of_layer_is_named_and_written_for_older_readers(
    tmp_path, whole, sliding, says
):
    case = tiny("gemma3_text")
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling"):
        case.config.pop(key, None)
    case.config["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6} | whole,
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }
    recipe = (
        case.recipe.with_field("goal", "serve")
        .with_field("runtime", "transformers")
        .with_field("runtime_version", "4.55.0")
    )
    path = case.write(tmp_path / "in")
    found = [f.message for f in check(path, recipe).findings if f.code == "C160"]
    assert [message.partition(";")[0] for message in found] == ([says] if says else [])
    if says:
        fix(path, tmp_path / "out", recipe, only=["C160"])
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["rope_theta"] == 1e6 and config["rope_local_base_freq"] == sliding
        assert config.get("rope_scaling") == (whole or None)
