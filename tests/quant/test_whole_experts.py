"""Experts that lie one below the other in a parameter that is no linear's weight: kept, and said so."""

import json
import random

import pytest
import torch

from doctor import api
from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of


@pytest.fixture(scope="module")
def dbrx(tmp_path_factory):
    from transformers import AutoModelForCausalLM, DbrxConfig

    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes = {"vocab_size": 96, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    config = DbrxConfig(
        **sizes, **ends, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, ffn_config=experts
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dbrx")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "recipe",
    [Recipe(group_size=32), Recipe(**fields_of("FP8_DYNAMIC", {"method": "rtn"}))],
    ids=["gptq", "FP8_DYNAMIC"],
)
def test_a_run_names_every_tensor_of_experts_that_it_keeps(dbrx, tmp_path, recipe):
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(16)]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    options = {"calibration": text, "max_seq_length": 64} if recipe.calibrated else {}
    result = api.quantize(dbrx, tmp_path / "o", recipe, tune="off", **options)
    found = sorted(f.message for f in result.report.findings if f.code == "Q416")
    assert result.output and len(found) == 1  # however many layers there are
    first = "6 tensors of experts stay in 16 bits, first transformer.blocks.0.ffn.experts.mlp."
    assert found[0].startswith(first)
    assert found[0].endswith(": experts in one tensor [256, 64]; no known form of fused experts fits it")


def test_a_check_says_it_beforehand_unless_they_are_kept_by_name(dbrx):
    found = [f for f in api.check(dbrx, Recipe(group_size=32)).findings if f.code == "G313"]
    assert [f.evidence["stacks"] for f in found] == [6]
    assert found[0].message.startswith("6 fused expert tensors (first transformer.blocks.0.ffn.experts.mlp.v1) hold")
    asked = Recipe(group_size=32, keep=("experts",))
    assert not [f for f in api.check(dbrx, asked).findings if f.code == "G313"]
