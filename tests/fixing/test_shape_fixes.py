"""Fixes that cast tensors or append rows and heads."""

import numpy as np
import pytest
from fix_cases import codes

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes, to_bf16
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.edits.kinds import CastTensor
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.testing import encode, tiny
from doctor.report.plan_text import render_plan


def test_mixed_types_become_the_commonest_one(tmp_path):
    case = tiny()
    name = case.name("down", 1)
    values = np.random.default_rng(3).normal(0, 0.08, case.tensors[name].shape).astype(np.float32)
    case.tensors[name], case.dtypes[name] = values, "F32"
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, dry_run=True).plan.steps
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True)
    out = Checkpoint.open(tmp_path / "out")
    assert codes(result) == {"F056"} and out.tensors[name].dtype.name == "BF16"
    assert (out.load(name) == to_bf16(values)).all() and "f32 → bf16 [64, 128] values change" in render_plan(result)


def test_a_cast_that_widens_is_safe_and_exact(tmp_path):
    case = tiny(dtype="F32")
    case.config["torch_dtype"] = "float32"
    name = case.name("down", 1)
    case.tensors[name], case.dtypes[name] = to_bf16(case.tensors[name]), "BF16"
    case.config["num_hidden_layers"] = 3
    for n in [n for n in case.tensors if ".layers.0." in n]:
        case.tensors[n.replace(".0.", ".2.")], case.dtypes[n.replace(".0.", ".2.")] = case.tensors[n].copy(), "F32"
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe)
    assert codes(result) == {"F056"}
    assert (Checkpoint.open(tmp_path / "out").load(name) == from_codes(case.tensors[name], "BF16")).all()


def test_a_cast_that_would_make_inf_is_refused_with_the_numbers(tmp_path):
    case = tiny(dtype="BF16")
    case.down()[3, 5] = encode([1e6], "BF16")[0]
    view = EditedCheckpoint(Checkpoint.open(case.write(tmp_path / "source")), [CastTensor(case.name("down"), "F16")])
    with pytest.raises(PlanRefused, match="1 finite values, up to 999424, exceed F16; a cast would make them Inf"):
        view.load(case.name("down"))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_for_new_tokens_are_the_mean_and_old_logits_stay(tmp_path, tied):
    case = tiny("llama")
    case.json["tokenizer.json"]["added_tokens"].append({"id": 97, "content": "<|tool|>", "special": True})
    if tied:
        case.config["tie_word_embeddings"] = True
        del case.tensors["lm_head.weight"]
    case.recipe = case.recipe.with_field("tp", 2)
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, unsafe_fixes=("C107",))
    out = Checkpoint.open(tmp_path / "out")
    assert codes(result) == {"C107"} and out.value("config.json")["vocab_size"] == 128
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        rows = from_codes(out.load(name), "BF16")
        mean = to_bf16(from_codes(case.tensors[name], "BF16").astype(np.float64).mean(0).astype(np.float32))
        assert (
            rows.shape == (128, 64)
            and (out.load(name)[96:] == mean).all()
            and (out.load(name)[:96] == case.tensors[name]).all()
        )
    assert [p.status for p in result.proofs] in (["equal"], ["agrees"]) and not check(
        tmp_path / "out", case.recipe
    ).findings


@pytest.mark.parametrize(
    "family, heads, kv, tp, want",
    [("llama", 4, 2, 8, (8, 2)), ("qwen2", 4, 2, 8, (8, 2)), ("llama", 4, 4, 8, (8, 8)), ("mistral", 4, 1, 8, (8, 1))],
)
def test_heads_of_zeros_leave_the_logits_as_they_were(tmp_path, family, heads, kv, tp, want):
    case = tiny(family)
    rng = np.random.default_rng(4)
    case.config.update(num_attention_heads=heads, num_key_value_heads=kv)
    for name in list(case.tensors):
        for part, n in (("q_proj", heads), ("k_proj", kv), ("v_proj", kv)):
            if f"{part}.weight" in name:
                case.tensors[name] = encode(rng.normal(0, 0.08, (n * 16, 64)), "BF16")
            elif f"{part}.bias" in name:
                case.tensors[name] = encode(rng.normal(0, 0.1, n * 16), "BF16")
        if "o_proj.weight" in name:
            case.tensors[name] = encode(rng.normal(0, 0.08, (64, heads * 16)), "BF16")
    case.recipe = case.recipe.with_field("tp", tp).with_field("group_size", -1)
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True).plan.steps
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=("G304",))
    document = Checkpoint.open(tmp_path / "out").value("config.json")
    assert codes(result) == {"G304"} and (document["num_attention_heads"], document["num_key_value_heads"]) == want
    assert [p.status for p in result.proofs] in (["equal"], ["agrees"]), result.proofs
