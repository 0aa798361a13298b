"""Models as transformers saves them: every linear of every mixture of experts is found, gets its own Hessian and is quantized."""

import json
import random
import re

import pytest
import torch

from doctor import api
from doctor.checkpoint import Checkpoint
from doctor.errors import DoctorError, NotQuantizable
from doctor.quant.blocks import load_tensor
from doctor.quant.dequant import as_float
from doctor.recipe import Recipe

from healthy_models import save

# Latent attention has as many key heads as query heads, whatever the other families' sizes are.
OWN = {"deepseek_v2": {"num_key_value_heads": 4}, "deepseek_v3": {"num_key_value_heads": 4}}
MIXTURES = ("mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 olmoe phimoe ernie4_5_moe glm4_moe hunyuan_v1_moe minimax_m2 "
            "qwen3_5_moe_text qwen3_next").split()
IN_ONE_TENSOR = "granitemoe gpt_oss llama4_text".split()


@pytest.fixture
def text(tmp_path):
    """32 rows of 64 random ids."""
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(63)]}) for _ in range(32)))
    return path


def quantized(family, tmp_path, text, method="gptq", **changes):
    save(family, tmp_path / "m", **(OWN.get(family, {}) | changes))
    return api.quantize(tmp_path / "m", tmp_path / "o", Recipe(method=method, group_size=32), calibration=text, max_seq_length=64)


@pytest.mark.parametrize("family, method", [*((f, "gptq") for f in MIXTURES), ("mixtral", "awq"), ("deepseek_v3", "awq"), ("olmoe", "rtn")])
def test_every_expert_is_quantized_on_what_reached_it(family, method, tmp_path, text):
    done = quantized(family, tmp_path, text, method)
    experts = [line for line in done.linears if ".experts." in line["name"]]
    assert done.output and {line["outcome"] for line in done.linears} == {method} and len(experts) >= 4
    assert not [f for f in done.report.findings if f.severity == "error"]
    if method != "rtn":
        reached = {(line["block"], line["name"].split(".experts.")[1].split(".")[0]): line["hessian"]["tokens"] for line in experts}
        assert len(set(reached.values())) > 1 and all(0 < n < 32 * 64 for n in reached.values())
    stored = Checkpoint.open(done.output).tensors
    assert all(f"{line['name']}.qweight" in stored for line in experts)


@pytest.mark.parametrize("family", IN_ONE_TENSOR)
def test_experts_in_one_tensor_are_kept_and_said_so_while_the_rest_is_quantized(family, tmp_path, text):
    done = quantized(family, tmp_path, text)
    kept = {line["name"] for line in done.linears if line["outcome"] == "kept"}
    assert done.output and kept and sum(line["outcome"] == "gptq" for line in done.linears) >= 12
    assert {f.code for f in done.report.findings} >= {"G313", "Q416"}


def test_sizes_that_the_models_own_code_cannot_compute_with_are_refused_with_its_words(tmp_path, text):
    with pytest.raises(NotQuantizable, match="DeepseekV3DecoderLayer cannot compute: RuntimeError: The size of tensor"):
        quantized("deepseek_v3", tmp_path, text, num_key_value_heads=2)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_named_linears_get_their_own_width_and_the_config_says_so(format, tmp_path, text):
    save("llama", tmp_path / "m")
    recipe = Recipe(group_size=32, format=format, bits_for=("self_attn=8", "layers.{0,2}.*down_proj=8", "layers.2.self_attn=4"))
    done = api.quantize(tmp_path / "m", tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    assert done.output
    wide = {line["name"] for line in done.linears if recipe.for_linear(line["name"]).bits == 8}
    assert len(wide) == 10 and "model.layers.2.self_attn.q_proj" not in wide and "model.layers.2.mlp.down_proj" in wide
    worst = {bits: max(line["solve"]["loss"] for line in done.linears if (line["name"] in wide) == (bits == 8)) for bits in (4, 8)}
    assert worst[8] < worst[4] / 50
    written = Checkpoint.open(done.output)
    read, stated = as_float(written), written.value("config.json")["quantization_config"]
    original = Checkpoint.open(tmp_path / "m")
    for line in done.linears:
        W = load_tensor(original, f"{line['name']}.weight", torch.float32)
        error = (torch.from_numpy(read.load(f"{line['name']}.weight")) - W).norm() / W.norm()
        assert error < (0.012 if line["name"] in wide else 0.2) and (line["name"] in wide or error > 0.05)
    if format == "compressed-tensors":
        assert set(stated["config_groups"]["group_1"]["targets"]) == wide
    else:
        named = [p.removeprefix("+:") for p, own in stated["dynamic"].items() if own == {"bits": 8}]
        assert all(any(re.match(p, name) for p in named) for name in wide) and stated["bits"] == 4
        assert any(re.match(p, "model.layers.0.self_attn.qkv_proj") for p in named)      # vLLM joins them
        assert not any(re.match(p, "model.layers.1.mlp.down_proj") for p in named)


@pytest.mark.parametrize("options, words", [
    ({"bits_for": ("q_proj=8",)}, "engines join q, k, v into one linear"),
    ({"bits_for": ("w_proj=8",)}, "no linear that is quantized has such a name"),
    ({"bits_for": ("down_proj=5",)}, "must be PATTERN=BITS with 2, 3, 4 or 8 bits"),
    ({"format": "awq", "bits": 8}, "awq with 8 bits; must be 4"),
    ({"bits_for": ("down_proj=8",), "method": "awq"}, "AWQ has one width for all linears"),
    ({"bits_for": ("down_proj=8",), "format": "awq"}, "AWQ has one width for all linears")])
def test_widths_that_no_reader_would_understand_are_refused(options, words, tmp_path, text):
    save("llama", tmp_path / "m")
    with pytest.raises(DoctorError, match=words):
        api.quantize(tmp_path / "m", tmp_path / "o", Recipe(group_size=32, **options), calibration=text, max_seq_length=64)
