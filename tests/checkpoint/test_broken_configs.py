"""Whatever stands in config.json, the commands that build a model of it end in findings or in one sentence, never in a
traceback.
"""

import json

import pytest
from click.testing import CliRunner

from doctor import api
from doctor.cli.main import cli
from doctor.core.errors import DoctorError
from doctor.lint.testing import tiny

WRONG = ("2", -1, 0, 1 << 70, None, [1, 2], {"a": 1})
KEYS = (
    *tiny().config,
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "quantization_config",
    "dtype",
    "attn_config",
    "text_config",
)
SLOW = (
    "num_hidden_layers",
    "eos_token_id",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "rope_parameters",
    "quantization_config",
)


def survives(action):
    """The message where the action was refused, "" where it went through; anything but a DoctorError is a failure."""
    try:
        action()
    except DoctorError as error:
        assert len(error.message) > 10
        return error.message
    return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    good = tiny().write(folder / "good")
    text = folder / "text.jsonl"
    text.write_text(json.dumps({"input_ids": list(range(3, 19))}) + "\n")
    return good, tiny().write(folder / "bad"), text


def put(folder, key, value):
    (folder / "config.json").write_text(json.dumps({**tiny().config, key: value}))


@pytest.mark.parametrize("key", KEYS)
def test_kvcache_takes_or_refuses_every_value(key, model):
    for value in WRONG:
        put(model[1], key, value)
        survives(lambda: api.kvcache(model[1]))


@pytest.mark.parametrize("key", SLOW)
def test_verify_and_quantize_take_or_refuse_every_value(key, model, tmp_path):
    good, bad, text = model
    for value in WRONG:
        put(bad, key, value)
        survives(lambda: api.verify(good, bad, text=text, context=8, rows=1, memory=0))
        survives(lambda: api.verify(bad, good, text=text, context=8, rows=1, memory=0))
        survives(
            lambda: api.quantize(
                bad, tmp_path / "q", tiny().recipe, calibration=text, rows=1, max_seq_length=8, overwrite=True
            )
        )


def test_an_id_in_quotes_is_named_and_the_sizes_are_told_all_the_same(model):
    """transformers refuses "2" where it wants 2; the cache's size does not depend on it."""
    put(model[1], "eos_token_id", "2")
    done = CliRunner().invoke(cli, ["kvcache", str(model[1])])
    assert (
        done.exit_code == 0
        and "KiB/token" in done.output
        and "cannot build llama" in done.output
        and "eos_token_id" in done.output
    )
    assert "C106" in {f.code for f in api.check(model[1], tiny().recipe).findings}


def test_a_number_of_layers_that_no_model_has_is_refused(model):
    put(model[1], "num_hidden_layers", 1 << 70)
    assert "layers; must be a whole number from 1 to 10,000" in survives(lambda: api.kvcache(model[1]))
