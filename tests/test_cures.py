"""Cures that need more than the checkpoint itself: tensors from a base model, adapters merged, packed weights made plain."""

import json

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint import Checkpoint
from doctor.edits import AddLowRank, CastTensor, GrowRows, TakeTensor, from_codes, to_bf16
from doctor.errors import BadCheckpoint, PlanRefused
from doctor.report.plan_text import render_plan
from doctor.testing import encode, shard_bytes, tiny
from doctor.view import EditedCheckpoint


def codes(result):
    return {s.code for s in result.plan.steps}


# taken from a base


def test_a_broken_tensor_is_taken_from_a_base_that_agrees_with_what_is_left(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[3, 5] = 0x7FC0
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, base=base)
    assert codes(result) == {"W201"} and result.report.ok and not result.report.findings
    assert (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()
    edit = json.loads(result.receipt_path.read_text())["steps"][0]["edits"][0]
    assert edit["kind"] == "TakeTensor" and edit["root"] == str(base) and len(edit["digest"]) == 32
    assert "all 8,191 finite values that are left agree with it" in render_plan(result)


def test_a_base_that_differs_is_offered_as_unsafe_with_the_count(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    case.down()[3, 5] = 0x7FC0
    case.down()[7, 7] ^= 1
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, base=base)
    assert not result.plan.steps and "1 of its 8,191 finite values differ from this tensor's" in render_plan(result)
    assert codes(fix(source, tmp_path / "out", case.recipe, base=base, unsafe_fixes=True)) == {"W201"}


def test_a_base_that_is_broken_too_or_of_another_shape_gives_nothing(tmp_path):
    case = tiny()
    case.down()[3, 5] = 0x7FC0
    source, base = case.write(tmp_path / "source"), case.write(tmp_path / "base")
    result = fix(source, tmp_path / "out", case.recipe, base=base, dry_run=True)
    assert [s.title for s in result.plan.optional] == ["replace the non-finite values by 0"]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_missing_tensor_is_added_beside_its_block_and_to_the_index(tmp_path, shards):
    case = tiny()
    case.shards = shards
    base = case.write(tmp_path / "base")
    name = case.name("down", 1)
    want = case.tensors.pop(name)
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, base=base, unsafe_fixes=True)
    assert codes(result) == {"F050"} and not check(tmp_path / "out", case.recipe).findings
    out = Checkpoint.open(tmp_path / "out")
    assert (out.load(name) == want).all() and f"{name}  bf16 [64, 128] added" in render_plan(result)


def test_a_tensor_of_the_wrong_shape_is_taken_from_the_base(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    name = case.name("down", 1)
    want, case.tensors[name] = case.tensors[name], np.ascontiguousarray(case.tensors[name][:, :96])
    source = case.write(tmp_path / "source")
    result = fix(source, tmp_path / "out", case.recipe, base=base, unsafe_fixes=True)
    assert codes(result) == {"F051"} and (Checkpoint.open(tmp_path / "out").load(name) == want).all()


def test_an_all_zero_tensor_is_taken_only_as_an_unsafe_fix(tmp_path):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[:] = 0
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, base=base, dry_run=True).plan.steps
    assert "W202" in codes(fix(source, tmp_path / "out", case.recipe, base=base, unsafe_fixes=True))
    assert (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()


def test_a_base_that_changed_after_the_plan_is_refused(tmp_path):
    case = tiny()
    base, source = case.write(tmp_path / "base"), Checkpoint.open(case.write(tmp_path / "source"))
    view = EditedCheckpoint(source, [TakeTensor(case.name("down"), str(base), "0" * 32)])
    with pytest.raises(PlanRefused, match=f"{case.name('down')} has blake2b [0-9a-f]{{32}}; the edit was made for 0000"):
        view.load(case.name("down"))


def test_what_from_names_must_hold_weights_and_be_another_directory(tmp_path):
    case = tiny()
    source = case.write(tmp_path / "source")
    with pytest.raises(BadCheckpoint, match="is the checkpoint itself"):
        fix(source, tmp_path / "out", base=source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="no safetensors tensor can be read; --from needs weights"):
        fix(source, tmp_path / "out", base=tmp_path / "empty")


# casts


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
    with pytest.raises(PlanRefused, match="1 finite values, up to 999424, are beyond F16"):
        view.load(case.name("down"))


# adapters


def adapter(folder, case, roles=("q", "down"), r=4, **config):
    rng = np.random.default_rng(9)
    tensors = {}
    for role in roles:
        n, k = case.tensors[case.name(role)].shape
        stem = "base_model.model." + case.name(role).removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = rng.normal(0, 0.1, (r, k)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = rng.normal(0, 0.1, (n, r)).astype(np.float32)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(tensors, dict.fromkeys(tensors, "F32")))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": 8, "base_model_name_or_path": "org/base",
                                                            "target_modules": list(roles), **config}))
    return folder, tensors


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_in_float32_and_rounded_once(tmp_path, rslora):
    case = tiny()
    case.shards = 2
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case, use_rslora=rslora)
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    assert codes(result) == {"F022"} and not check(tmp_path / "out", case.recipe).findings
    out = Checkpoint.open(tmp_path / "out")
    for name, old in case.tensors.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in parts:
            assert (out.load(name) == old).all()
            continue
        change = parts[f"{stem}.lora_B.weight"].astype(np.float64) @ parts[f"{stem}.lora_A.weight"].astype(np.float64)
        want = from_codes(old, "BF16").astype(np.float64) + (8 / 2 if rslora else 8 / 4) * change
        got = from_codes(out.load(name), "BF16")
        # Half a unit in the last of bf16's 8 bits, and a little for float32's own sums.
        assert not (np.abs(got - want) > np.abs(want) * 2.0**-8 * 1.01 + 1e-6).any() and (out.load(name) != old).any()
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before and (tmp_path / "out" / "tokenizer.json").exists()


def test_a_merge_is_the_one_that_peft_defines(tmp_path):
    import torch
    import transformers

    case = tiny()
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case)
    fix(folder, tmp_path / "out", case.recipe, base=base)
    ids = torch.arange(3, 19)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def hook(a, b):
        return lambda module, inputs, output: output + 2.0 * (inputs[0] @ a.T @ b.T)

    for name in {n.rpartition(".lora_")[0] for n in parts}:
        a, b = (torch.from_numpy(parts[f"{name}.lora_{side}.weight"]) for side in "AB")
        model.get_submodule(name.removeprefix("base_model.model.")).register_forward_hook(hook(a, b))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        want, got = model(ids).logits, merged(ids).logits
    assert not (got - want).abs().max() > 0.02 * want.abs().max()


@pytest.mark.parametrize("more, why", [({"use_dora": True}, "adapter_config.json sets use_dora"), ({"bias": "all"}, "sets bias"),
                                       ({"peft_type": "IA3"}, "peft_type is IA3, not LORA"), ({"r": 8}, "of rank 4, and r is 8"),
                                       ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"), ({"lora_alpha": None}, "lora_alpha None")])
def test_what_is_more_than_lora_is_refused_by_name(tmp_path, more, why):
    case = tiny()
    base = case.write(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", case)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    assert not result.plan.steps and not (tmp_path / "out").exists()
    assert why in next(f.fix.title for f in result.plan.for_you if f.code == "F022")


def test_a_merge_with_a_matrix_that_is_not_finite_is_refused(tmp_path):
    case = tiny()
    base = Checkpoint.open(case.write(tmp_path / "base"))
    name = case.name("down")
    parts = {"a": np.full((2, 128), np.nan, np.float32), "b": np.ones((64, 2), np.float32)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(shard_bytes(parts, dict.fromkeys(parts, "F32")))
    with pytest.raises(PlanRefused, match="a: 256 values are not finite"):
        EditedCheckpoint(base, [AddLowRank(name, str(tmp_path / "adapter"), "a", "b", 1.0)])
    assert GrowRows(name, 3).target == f"tensor:{name}:axis0"
