"""Models as transformers saves them: every linear of every mixture of experts is found, gets its own Hessian and is quantized."""

import json
import random

import pytest

from doctor import api
from doctor.checkpoint import Checkpoint
from doctor.errors import NotQuantizable
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
