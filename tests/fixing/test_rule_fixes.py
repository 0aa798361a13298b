"""Cures that need more than the checkpoint itself: tensors from a base model, adapters merged, packed weights made
plain.
"""

import json
import os
import sys

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes, to_bf16
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.edits.kinds import AddLowRank, CastTensor, GrowRows, TakeTensor
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.rule import RULES
from doctor.lint.testing import encode, shard_bytes, tiny
from doctor.report.plan_text import render_plan


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
    assert edit["kind"] == "TakeTensor" and edit["root"] == base.name and len(edit["digest"]) == 32
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


@pytest.mark.parametrize("code, where", [("W203", (slice(5, 6), slice(32, 64))), ("W204", (slice(3, 5), slice(None)))])
def test_zeros_that_only_this_copy_has_are_filled_from_a_base_that_agrees_elsewhere(tmp_path, code, where):
    case = tiny()
    base = case.write(tmp_path / "base")
    want = case.down().copy()
    case.down()[where] = 0
    count = want[where].size
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "safe", case.recipe, base=base).plan.steps
    result = fix(source, tmp_path / "out", case.recipe, base=base, unsafe_fixes=True)
    assert [s.title for s in result.plan.steps] == [
        f"take the tensor from {base}: its other {want.size - count:,} values are equal, and {count} are 0 only here"
    ]
    assert (
        codes(result) == {code}
        and not result.report.findings
        and (Checkpoint.open(tmp_path / "out").load(case.name("down")) == want).all()
    )
    for spoil in ((0, 0), (where[0].start, 40)):  # a value that differs; and zeros that the base has too
        other = tiny()
        other.down()[spoil] = 0x3F80
        other.down()[where] = 0 if spoil != (0, 0) else other.down()[where]
        again = fix(
            source, tmp_path / "no", case.recipe, base=other.write(tmp_path / f"other{spoil[0]}"), unsafe_fixes=True
        )
        assert not again.plan.steps


@pytest.mark.parametrize("family, number", [("llama", 0), ("phi3", 1)])
def test_a_cut_width_is_undone_with_a_base_that_it_is_the_first_part_of(tmp_path, family, number):
    from doctor.rules.f060_cut_width import more

    case = list(more())[number]
    facts = [(s, n, v) for (s, n), v in case.facts.items()]
    source, whole = case.write(tmp_path / "source"), tiny(family, mlp=352)
    base = whole.write(tmp_path / "base")
    assert "F060" not in codes(fix(source, tmp_path / "safe", case.recipe, base=base, facts=facts, only=["F060"]))
    result = fix(source, tmp_path / "out", case.recipe, base=base, facts=facts, only=["F060"], unsafe_fixes=["F060"])
    assert codes(result) == {"F060"} and not [f for f in result.report.findings if f.code in ("F051", "F060")]
    out = Checkpoint.open(tmp_path / "out")
    assert out.value("config.json")["intermediate_size"] == 352 and all(
        (out.load(n) == a).all() for n, a in whole.tensors.items()
    )
    whole.tensors[whole.name("down")][1, 1] ^= 1
    (item,) = [
        f
        for f in fix(
            source,
            tmp_path / "no",
            case.recipe,
            base=whole.write(tmp_path / "other"),
            facts=facts,
            unsafe_fixes=["F060"],
            only=["F060"],
        ).plan.for_you
        if f.code == "F060"
    ]
    assert item.fix.safety == "manual"


def test_a_base_that_changed_after_the_plan_is_refused(tmp_path):
    case = tiny()
    base, source = case.write(tmp_path / "base"), Checkpoint.open(case.write(tmp_path / "source"))
    view = EditedCheckpoint(source, [TakeTensor(case.name("down"), str(base), "0" * 32)])
    with pytest.raises(
        PlanRefused, match=f"{case.name('down')} has blake2b [0-9a-f]{{32}}; the edit was made for 0000"
    ):
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
    with pytest.raises(PlanRefused, match="1 finite values, up to 999424, exceed F16; a cast would make them Inf"):
        view.load(case.name("down"))


# adapters


def adapter(folder, case, roles=("q", "down"), r=4, **config):
    """An adapter on disk and its tensors; with use_dora, magnitudes that differ from the sums' own by up to a third."""
    rng = np.random.default_rng(9)
    tensors = {}
    for role in roles:
        n, k = case.tensors[case.name(role)].shape
        stem = "base_model.model." + case.name(role).removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = rng.normal(0, 0.1, (r, k)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = rng.normal(0, 0.1, (n, r)).astype(np.float32)
        if config.get("use_dora"):
            tensors[f"{stem}.lora_magnitude_vector"] = rng.uniform(0.5, 1.0, n).astype(np.float32)
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(tensors, dict.fromkeys(tensors, "F32")))
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": r,
                "lora_alpha": 8,
                "base_model_name_or_path": "org/base",
                "target_modules": list(roles),
                **config,
            }
        )
    )
    return folder, tensors


def adapted(case, parts, out):
    """(name, codes, stem of its adapter's tensors) of each weight that the adapter changes; every other one is in `out`
    as it was.
    """
    for name, old in case.tensors.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in parts:
            yield name, old, stem
        else:
            assert (out.load(name) == old).all()


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
    for name, old, stem in adapted(case, parts, out):
        change = parts[f"{stem}.lora_B.weight"].astype(np.float64) @ parts[f"{stem}.lora_A.weight"].astype(np.float64)
        want = from_codes(old, "BF16").astype(np.float64) + (8 / 2 if rslora else 8 / 4) * change
        got = from_codes(out.load(name), "BF16")
        # Half a unit in the last of bf16's 8 bits, and a little for float32's own sums.
        assert (np.abs(got - want) <= np.abs(want) * 2.0**-8 * 1.01 + 1e-6).all() and (out.load(name) != old).any()
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
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


def test_ranks_by_pattern_and_modules_trained_whole_are_merged_as_peft_does(tmp_path):
    """The same adapters gave PEFT 0.21's own merge_and_unload() the same numbers, to the last bit of float32 but
    one.
    """
    case = tiny("llama")
    base = case.write(tmp_path / "base")
    folder, parts = adapter(
        tmp_path / "adapter",
        case,
        modules_to_save=["lm_head"],
        rank_pattern={"layers.0.mlp.down_proj": 4},
        r=4,
        alpha_pattern={"layers.0.mlp.down_proj": 2, ".*q_proj": 6},
    )
    head = np.random.default_rng(8).normal(0, 0.1, (96, 64)).astype(np.float32)
    held = parts | {"base_model.model.lm_head.weight": head}
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(held, dict.fromkeys(held, "F32")))
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    out = Checkpoint.open(tmp_path / "out")
    assert codes(result) == {"F022"} and (out.load("lm_head.weight") == to_bf16(head)).all()
    for name in {n.rpartition(".lora_")[0] for n in parts}:
        alpha = 2 if name.endswith("layers.0.mlp.down_proj") else 6 if name.endswith("q_proj") else 8
        a, b = (parts[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        weight = name.removeprefix("base_model.model.") + ".weight"
        want = from_codes(case.tensors[weight], "BF16") + alpha / 4 * b @ a
        got = from_codes(out.load(weight), "BF16")
        assert (np.abs(got - want) <= np.abs(want) * 2**-8 + 1e-6).all(), name


def dora_sum(weight, a, b, scale, magnitude):
    """PEFT's merge with magnitudes (lora/variants.py, DoraLinearVariant.merge_safe), in the precision of its
    arguments.
    """
    delta = b @ a * scale
    norm = np.sqrt(((weight + delta) ** 2).sum(1))
    return (magnitude / norm)[:, None] * (weight + delta)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_brings_each_output_to_its_magnitude_and_rounds_once(tmp_path, rslora):
    """merge_and_unload() of PEFT 0.21.2 gave, from such adapters of a Llama and of a GPT-2, the same bf16 and fp16
    numbers in all but 2 of 422,656 places, where it is one unit in the last place beside; in fp32, a few units.
    """
    case = tiny()
    case.shards = 2
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case, use_dora=True, use_rslora=rslora, rank_pattern={"down_proj": 4})
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    assert codes(result) == {"F022"} and not check(tmp_path / "out", case.recipe).findings
    out = Checkpoint.open(tmp_path / "out")
    for name, old, stem in adapted(case, parts, out):
        a, b, m = (
            parts[f"{stem}.lora_{part}"].astype(np.float64) for part in ("A.weight", "B.weight", "magnitude_vector")
        )
        want = dora_sum(from_codes(old, "BF16").astype(np.float64), a, b, 8 / 2 if rslora else 8 / 4, m)
        got = from_codes(out.load(name), "BF16")
        assert (np.abs(got - want) <= np.abs(want) * 2.0**-8 * 1.01 + 1e-6).all()
        assert (
            np.abs(np.linalg.norm(got.astype(np.float64), axis=1) / m - 1) <= 2.0**-8
        ).all()  # lengths are the magnitudes


def test_a_merge_with_magnitudes_is_the_function_that_was_trained(tmp_path):
    """PEFT's forward of DoRA (lora/dora.py, DoraLinearLayer), written out as hooks on the base."""
    import torch
    import transformers

    case = tiny()
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case, use_dora=True)
    fix(folder, tmp_path / "out", case.recipe, base=base)
    ids = torch.arange(3, 19)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def hook(a, b, magnitude):
        def forward(module, inputs, output):
            norm = torch.linalg.norm(module.weight + 2.0 * (b @ a), dim=1)
            bias = 0 if module.bias is None else module.bias
            return output + (magnitude / norm - 1) * (output - bias) + magnitude / norm * (inputs[0] @ a.T @ b.T) * 2.0

        return forward

    for name in {n.rpartition(".lora_")[0] for n in parts}:
        matrices = (
            torch.from_numpy(parts[f"{name}.lora_{part}"]) for part in ("A.weight", "B.weight", "magnitude_vector")
        )
        model.get_submodule(name.removeprefix("base_model.model.")).register_forward_hook(hook(*matrices))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        want, got = model(ids).logits, merged(ids).logits
    assert (got - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("transposed", [False, True])
def test_magnitudes_are_read_in_slabs_of_any_height(tmp_path, transposed, monkeypatch):
    from doctor.edits import derived

    monkeypatch.setattr(derived, "MEAN_SLAB", 1000)
    case = tiny(dtype="F32")
    name = case.name("down")
    weight = case.tensors[name]
    n, k = weight.shape[::-1] if transposed else weight.shape
    rng = np.random.default_rng(2)
    parts = {
        "a": rng.normal(0, 0.1, (3, k)).astype(np.float32),
        "b": rng.normal(0, 0.1, (n, 3)).astype(np.float32),
        "m": rng.uniform(0.5, 1, n).astype(np.float32),
    }
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x.safetensors").write_bytes(shard_bytes(parts, dict.fromkeys(parts, "F32")))
    base = Checkpoint.open(case.write(tmp_path / "base"))
    view = EditedCheckpoint(base, [AddLowRank(name, str(tmp_path / "adapter"), "a", "b", 0.5, transposed, "m")])
    w, a, b, m = (x.astype(np.float64) for x in (weight, parts["a"], parts["b"], parts["m"]))
    want = dora_sum(w.T, a, b, 0.5, m).T if transposed else dora_sum(w, a, b, 0.5, m)
    whole = view.load(name)
    assert (np.abs(whole - want) <= 1e-6 * np.abs(want) + 1e-7).all()
    slabs = np.concatenate([part.copy() for part in view.rows(name, max_bytes=5 * whole[0].nbytes)])
    assert (np.abs(slabs - whole) <= 2e-7 * np.abs(whole)).all()


def test_an_output_without_a_direction_is_not_brought_to_a_magnitude(tmp_path):
    case = tiny()
    case.down()[5] = 0
    base = Checkpoint.open(case.write(tmp_path / "base"))
    parts = {"a": np.zeros((2, 128), np.float32), "b": np.ones((64, 2), np.float32), "m": np.ones(64, np.float32)}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "x.safetensors").write_bytes(shard_bytes(parts, dict.fromkeys(parts, "F32")))
    view = EditedCheckpoint(
        base, [AddLowRank(case.name("down"), str(tmp_path / "adapter"), "a", "b", 1.0, magnitude="m")]
    )
    with pytest.raises(PlanRefused, match="down_proj.weight: 1 outputs are all zero after the sum"):
        view.load(case.name("down"))


def test_magnitudes_beside_the_weights_are_merged_too(tmp_path):
    case = tiny("llama")
    _, parts = adapter(tmp_path / "adapter", case, use_dora=True)
    for name, values in parts.items():
        case.tensors[
            name.removeprefix("base_model.model.")
            .replace(".weight", ".default.weight")
            .replace("vector", "vector.default.weight")
        ] = values
    case.dtypes |= {n: "F32" for n in case.tensors if "lora_" in n}
    case.json["adapter_config.json"] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe)
    assert codes(result) == {"F057"} and not [f for f in result.report.findings if f.code == "F057"]
    out, name = Checkpoint.open(tmp_path / "out"), case.name("down")
    stem = "base_model.model." + name.removesuffix(".weight")
    want = dora_sum(
        from_codes(case.tensors[name], "BF16"),
        *(parts[f"{stem}.lora_{p}.weight"] for p in "AB"),
        2.0,
        parts[f"{stem}.lora_magnitude_vector"],
    )
    assert (np.abs(from_codes(out.load(name), "BF16") - want) <= np.abs(want) * 2**-8 * 1.01 + 1e-6).all()
    assert not [n for n in out.tensors if "lora_" in n]
    assert "adapter_config.json" not in out.entries  # or transformers would load the base that it names instead


def test_an_embedding_trained_apart_from_its_tied_head_is_not_merged(tmp_path):
    """What PEFT trained has the base's head; a checkpoint with one matrix for both cannot hold that."""
    case = tiny("gemma")
    base = case.write(tmp_path / "base")
    folder, parts = adapter(tmp_path / "adapter", case, modules_to_save=["embed_tokens"])
    held = parts | {"base_model.model.model.embed_tokens.weight": np.ones((96, 64), np.float32)}
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(held, dict.fromkeys(held, "F32")))
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    assert not result.plan.steps and "was trained separately; in the base, head and embedding share one matrix" in next(
        f.fix.title for f in result.plan.for_you if f.code == "F022"
    )


@pytest.mark.parametrize(
    "more, why",
    [
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"bias": "all"}, "sets bias"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "init_lora_weights is pissa_niter_16: training began by taking a part out",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora"),
        ({"kasa_config": {"beta": 1e-4}}, "sets kasa_config"),
        ({"a_key_of_tomorrow": True}, "sets a_key_of_tomorrow"),
        ({"modules_to_save": 3}, "no list of names"),
        ({"peft_type": "IA3"}, "peft_type is IA3, not LORA"),
        ({"r": 8}, "of rank 4, and r is 8"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but no tensor of it exists"),
        ({"lora_alpha": None}, "lora_alpha None"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(tmp_path, more, why):
    case = tiny()
    base = case.write(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", case)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    result = fix(folder, tmp_path / "out", case.recipe, base=base)
    assert not result.plan.steps and not (tmp_path / "out").exists()
    assert why in next(f.fix.title for f in result.plan.for_you if f.code == "F022")
    said = next(
        f.fix.title for f in check(folder, case.recipe).findings if f.code == "F022"
    )  # no base is asked for in vain
    assert why in said or (
        "modules_to_save" in more and said == "name the model to merge it into with --from, as org/base"
    )


@pytest.mark.parametrize(
    "more",
    [{"init_lora_weights": start} for start in (True, False, None, "gaussian", "orthogonal", "eva", "MICA")]
    + [
        {
            "eva_config": {"rho": 2.0},
            "loftq_config": {},
            "a_key_of_tomorrow": None,
            "runtime_config": {"ephemeral_gpu_offload": False},
        }
    ],
)
def test_what_says_how_it_was_trained_does_not_stop_a_merge(tmp_path, more):
    case = tiny("llama")
    folder, _ = adapter(tmp_path / "adapter", case, **more)
    assert codes(fix(folder, tmp_path / "out", case.recipe, base=case.write(tmp_path / "base"))) == {"F022"}


@pytest.mark.parametrize(
    "shape, why",
    [((3,), "and model.layers.0.self_attn.q_proj has 64 outputs"), (None, "which is DoRA's, and use_dora is not set")],
)
def test_magnitudes_that_do_not_fit_are_refused_by_name(tmp_path, shape, why):
    case = tiny("llama")
    folder, parts = adapter(tmp_path / "adapter", case, use_dora=shape is not None)
    held = parts | {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(shape or 64, np.float32)
    }
    (folder / "adapter_model.safetensors").write_bytes(shard_bytes(held, dict.fromkeys(held, "F32")))
    result = fix(folder, tmp_path / "out", case.recipe, base=case.write(tmp_path / "base"))
    assert not result.plan.steps and why in next(f.fix.title for f in result.plan.for_you if f.code == "F022")


def test_an_adapter_that_is_a_pickle_alone_is_not_merged_as_nothing(tmp_path):
    case = tiny("llama")
    folder, _ = adapter(tmp_path / "adapter", case)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    result = fix(folder, tmp_path / "out", case.recipe, base=case.write(tmp_path / "base"))
    assert not result.plan.steps and "in no safetensors file" in next(
        f.fix.title for f in result.plan.for_you if f.code == "F022"
    )


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


# packed weights made plain


def quantized(folder, form, bits=4, sym=True, act_order=False):
    """A tiny model packed by the project's own packers, which other programs' vectors prove."""
    import torch

    from doctor.core.recipe import Scheme
    from doctor.formats.base import KNOWN
    from doctor.formats.grid import Grid

    case = tiny("llama")
    rng = np.random.default_rng(5)
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        n, k = case.tensors.pop(name).shape
        groups, module = k // 32, name.removesuffix(".weight")
        codes = torch.from_numpy(rng.integers(0, 1 << bits, (n, k), np.uint8))
        zero = (
            torch.full((n, groups), 1 << (bits - 1), dtype=torch.int32)
            if sym
            else torch.from_numpy(rng.integers(1, 1 << bits, (n, groups), np.int32))
        )
        scale = torch.from_numpy(rng.uniform(0.01, 0.02, (n, groups)).astype(np.float16)).float()
        grid = Grid(scale, zero)
        index = torch.from_numpy(
            rng.permutation(k).astype(np.int32) // 32 if act_order else np.arange(k, dtype=np.int32) // 32
        )
        parts = KNOWN[form].pack(codes, grid, index, Scheme(bits, 32, sym))
        for tail, value in parts.items():
            array = value.numpy()
            kind = {"float16": "F16", "int32": "I32", "int64": "I64"}[str(array.dtype)]
            case.tensors[f"{module}.{tail}"], case.dtypes[f"{module}.{tail}"] = (
                array.view(np.uint16) if kind == "F16" else array,
                kind,
            )
    case.config["quantization_config"] = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": not sym, "version": "gemm"},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": bits,
                        "type": "int",
                        "symmetric": sym,
                        "group_size": 32,
                        "strategy": "group",
                    },
                }
            },
            "ignore": ["lm_head"],
        },
    }.get(
        form,
        {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 32,
            "sym": sym,
            "desc_act": act_order,
            "checkpoint_format": form,
        },
    )
    if form == "gptq":
        case.json["quantize_config.json"] = dict(case.config["quantization_config"])
    return case, case.write(folder)


FORMS = [
    ("gptq", 4, True, False),
    ("gptq", 3, False, False),
    ("gptq_v2", 8, True, True),
    ("gptq_v2", 2, False, False),
    ("awq", 4, False, False),
    ("compressed-tensors", 4, True, False),
    ("compressed-tensors", 8, False, False),
]


@pytest.mark.parametrize("form, bits, sym, act_order", FORMS)
def test_packed_weights_become_the_numbers_that_engines_compute_with(tmp_path, form, bits, sym, act_order):
    from doctor.quant.dequantize import as_float

    case, source = quantized(tmp_path / "source", form, bits, sym, act_order)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    assert codes(result) == {"C147"} and not (tmp_path / "out" / "quantize_config.json").exists()
    out, want = Checkpoint.open(tmp_path / "out"), as_float(Checkpoint.open(source))
    assert set(out.tensors) == set(tiny("llama").tensors) and "quantization_config" not in out.value("config.json")
    for name, info in out.tensors.items():
        assert info.dtype.name == "BF16"
        if "_proj.weight" in name:
            assert (out.load(name) == to_bf16(want.load(name))).all(), name
    assert not check(tmp_path / "out", case.recipe).findings


def test_a_packed_checkpoint_that_nobody_asked_to_unpack_stays(tmp_path):
    case, source = quantized(tmp_path / "source", "gptq")
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True)
    assert not result.plan.steps and "C147" not in {f.code for f in result.plan.before.findings}


@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_fp8_becomes_value_times_scale(tmp_path, scales):
    import torch

    case = tiny("llama")
    rng = np.random.default_rng(3)
    kept, tile = {}, [32, 64]
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        n, k = case.tensors[name].shape
        case.tensors[name] = rng.integers(0, 0x7F, (n, k), np.uint8) | rng.integers(0, 2, (n, k), np.uint8) << 7
        shape = {"tensor": (1,), "row": (n, 1), "block": (-(-n // tile[0]), -(-k // tile[1]))}[scales]
        scale = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
        tail = "_scale_inv" if scales == "block" else "_scale"
        case.tensors[name + tail], case.dtypes[name], case.dtypes[name + tail] = scale, "F8_E4M3", "F32"
        wide = scale if scales != "block" else scale.repeat(tile[0], 0)[:n].repeat(tile[1], 1)[:, :k]
        kept[name] = (torch.from_numpy(case.tensors[name]).view(torch.float8_e4m3fn).float().numpy() * wide).astype(
            np.float32
        )
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": tile if scales == "block" else None,
    }
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    out = Checkpoint.open(tmp_path / "out")
    assert codes(result) == {"C147"} and set(out.tensors) == set(tiny("llama").tensors)
    for name, want in kept.items():
        assert (out.load(name) == to_bf16(want)).all()


def test_every_e4m3_code_is_read_as_torch_reads_it():
    import torch

    from doctor.edits.dequantized import E4M3_VALUES

    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3_VALUES, want, equal_nan=True) and np.isnan(E4M3_VALUES).sum() == 2


# zero points and g_idx


def test_zero_points_move_to_version_1_where_the_config_has_no_key_for_versions(tmp_path):
    from doctor.lint.testing import tiny_gptq

    case = tiny_gptq("llama", version="gptq_v2")
    case.config["quantization_config"].pop("checkpoint_format", None)
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe)
    out = Checkpoint.open(tmp_path / "out")
    names = [n for n in out.tensors if n.endswith(".qzeros")]
    assert codes(result) == {"O608"} and len(names) == 14 and all((out.load(n) == 0x77777777).all() for n in names)
    assert out.value("config.json") == case.config


def test_a_zero_point_that_cannot_move_is_refused():
    from doctor.edits.arithmetic import shift_fields

    with pytest.raises(PlanRefused, match="w: 1 zero points are 0 and cannot move by -1 in 4 bits"):
        shift_fields(np.array([0x11111101], np.uint32).view(np.int32), 4, -1, "w")
    assert (
        shift_fields(np.array([0x77777777], np.uint32).view(np.int32), 4, 1, "w").view(np.uint32) == 0x88888888
    ).all()


def test_absent_and_wrong_group_indices_are_written_in_order(tmp_path):
    from doctor.lint.testing import tiny_gptq

    case = tiny_gptq("llama")
    one, other = case.packed("down") + ".g_idx", case.packed("down", 1) + ".g_idx"
    want = case.tensors.pop(one)
    case.tensors[other] = case.tensors[other] + 1
    source = case.write(tmp_path / "source")
    assert (fix(source, tmp_path / "safe", case.recipe).plan.overlay.load(one) == want).all()
    fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True)
    out = Checkpoint.open(tmp_path / "out")
    assert (
        (out.load(one) == want).all()
        and (out.load(other) == want).all()
        and not check(tmp_path / "out", case.recipe).findings
    )


# rows and heads


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


# the command line


@pytest.fixture
def doctor(capsys):
    """Run `doctor ARGS`: (exit code, stdout, stderr)."""
    from doctor.cli import main as cli

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)
        return end.value.code, *capsys.readouterr()

    return call


PLAN = ("--group-size", "32", "--config", "none")


def test_fix_takes_from_a_directory_and_check_fix_reports_on_the_copy(tmp_path, doctor):
    case = tiny()
    base = case.write(tmp_path / "base")
    case.down()[3, 5] = 0x7FC0
    case.json["generation_config.json"]["eos_token_id"] = 50
    source = case.write(tmp_path / "source")
    code, out, _ = doctor("fix", source, "-o", tmp_path / "out", "--from", base, *PLAN)
    assert code == 0 and "take the tensor from" in out and "No findings remain" in out
    code, out, err = doctor("check", source, "--fix", "-o", tmp_path / "two", "--concise", *PLAN)
    assert code == 1 and "W201" in out and "C105" not in out and "✓  C105" in err and "doctor-stage" not in out + err
    # What the cure left as it was is not read twice, and the report does not say that it was not read.
    assert (
        fix(source, tmp_path / "three", case.recipe, only=["C105"]).report.bytes_read
        == Checkpoint.open(source).total_bytes
    )


def test_a_rule_that_crashes_is_said_by_a_fix_too(tmp_path, doctor):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "c194_breaks.py").write_text(
        '"""C194 breaks: it breaks.\n\nWhy: it does.\n"""\nfrom doctor.lint.rule import rule\n\n\n'
        '@rule("C194", "error")\ndef breaks(checkpoint, config):\n    raise KeyError("x")\n    yield\n'
    )
    try:
        code, out, _ = doctor(
            "fix", tiny().write(tmp_path / "source"), "-o", tmp_path / "out", "--rules", tmp_path / "rules", *PLAN
        )
    finally:
        RULES.pop("C194", None)
        sys.modules.pop("doctor_extra_rules.c194_breaks", None)
    assert (
        code == 2
        and "☠  C194 crashed: checkpoint:: KeyError: 'x'; this is a defect of doctor" in out
        and "Exit 2: C194 remains." in out
    )


def test_a_dry_run_needs_no_output(tmp_path, doctor):
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 50
    code, out, _ = doctor("fix", case.write(tmp_path / "source"), "--dry-run", *PLAN)
    assert (
        code == 0
        and "+++ fixed/generation_config.json" in out
        and "Nothing was written. No findings would remain." in out
    )
    assert os.listdir(tmp_path) == ["source"]


def test_an_adapter_is_not_merged_in_its_own_place_nor_into_a_packed_base(tmp_path, doctor):
    case = tiny("llama")
    _, packed = quantized(tmp_path / "packed", "gptq")
    base = case.write(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", case)
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))
    code, _, err = doctor("fix", folder, "--in-place", "--from", base, *PLAN)
    assert (
        code == 2
        and "a merged adapter is another model than the adapter, so it cannot replace it. Hint: Write a copy with -o."
        in " ".join(err.split())
    )
    result = fix(folder, tmp_path / "out", case.recipe, base=packed)
    assert "is packed in the base; it must be the 16-bit original" in next(
        f.fix.title for f in result.plan.for_you if f.code == "F022"
    )
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))) == before


def test_in_place_and_undo_from_the_command_line(tmp_path, doctor):
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 50
    source = case.write(tmp_path / "source")
    assert doctor("fix", source, "--in-place", *PLAN)[0] == 0
    assert json.loads((source / "generation_config.json").read_text())["eos_token_id"] == [2, 50]
    code, out, _ = doctor("undo", source)
    assert (
        code == 0
        and "is as it was before the fix" in out
        and json.loads((source / "generation_config.json").read_text())["eos_token_id"] == 50
    )


@pytest.mark.parametrize(
    "args",
    [
        ("fix", "x"),
        ("fix", "x", "-o", "y", "--in-place"),
        ("check", "x", "--fix"),
        ("check", "x", "y", "--fix", "-o", "z"),
    ],
)
def test_unclear_orders_are_usage_errors(doctor, args):
    code, _, err = doctor(*args)
    assert code == 2 and "Error: " in err


# heads, by what the base does


def test_the_base_says_whether_a_missing_head_is_tied(tmp_path):
    case = tiny("llama")
    untied = case.write(tmp_path / "untied")
    head = case.tensors.pop("lm_head.weight")
    source = case.write(tmp_path / "source")
    case.config["tie_word_embeddings"] = True
    tied = case.write(tmp_path / "tied")
    safe = fix(source, tmp_path / "one", case.recipe, base=tied)
    assert (
        codes(safe) == {"F053"}
        and Checkpoint.open(tmp_path / "one").value("config.json")["tie_word_embeddings"] is True
    )
    assert not fix(source, tmp_path / "two", case.recipe, base=untied).plan.steps
    assert codes(fix(source, tmp_path / "two", case.recipe, base=untied, unsafe_fixes=True)) == {"F053"}
    assert (Checkpoint.open(tmp_path / "two").load("lm_head.weight") == head).all()


def test_a_base_that_does_not_tie_makes_keeping_the_stored_head_safe(tmp_path):
    case = tiny("llama")
    base = case.write(tmp_path / "base")
    case.config["tie_word_embeddings"] = True
    source = case.write(tmp_path / "source")
    assert not fix(source, tmp_path / "out", case.recipe, dry_run=True).plan.steps
    assert codes(fix(source, tmp_path / "out", case.recipe, base=base)) == {"F054"}
    assert Checkpoint.open(tmp_path / "out").value("config.json")["tie_word_embeddings"] is False


def test_every_kind_of_edit_is_used_by_a_rule():
    from pathlib import Path
    from typing import get_args

    from doctor.edits.kinds import Edit

    text = "\n".join(p.read_text() for p in (Path(__file__).parents[2] / "rules").glob("[a-z]*.py"))
    made_by = {"TakeTensor": "base.offer(", "TakeFile": "from_base("}
    assert not [kind.__name__ for kind in get_args(Edit) if made_by.get(kind.__name__, f"{kind.__name__}(") not in text]


@pytest.mark.parametrize("family", ["opt", "gemma", "phi3", "qwen2"])
def test_a_narrow_mlp_of_every_form_is_padded_for_two_gpus(tmp_path, family):
    case = tiny(family, mlp=96)
    case.recipe = case.recipe.with_field("tp", 2)
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, unsafe_fixes=("G302",))
    assert "G302" in codes(result) and [p.status for p in result.proofs] in (["equal"], ["agrees"])
    assert not [f for f in check(tmp_path / "out", case.recipe).findings if f.code == "G302"]


def test_a_packed_source_is_quantized_again_through_the_cure_without_a_copy(tmp_path):
    from doctor.api import quantize
    from doctor.core.recipe import Recipe

    _, source = quantized(tmp_path / "source", "gptq")
    result = quantize(source, tmp_path / "out", Recipe(method="rtn", group_size=32), fix=True, unsafe_fixes=("C147",))
    out = Checkpoint.open(tmp_path / "out")
    assert result.output and out.value("config.json")["quantization_config"]["group_size"] == 32
    assert any(n.endswith(".qweight") or n.endswith(".weight_packed") for n in out.tensors) and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["out", "source"]


def test_a_byte_order_mark_is_taken_away_and_nothing_else(tmp_path):
    source = tiny().write(tmp_path / "source")
    plain = (source / "config.json").read_bytes()
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + plain)
    result = fix(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == plain and not {
        f.code for f in result.report_after.findings
    } & {"C149", "C150"}


@pytest.mark.parametrize("first, safe", [('"llama"', True), ('"gpt2"', False)])
def test_a_key_that_stands_twice_keeps_the_value_that_readers_take(first, safe, tmp_path):
    source = tiny("llama").write(tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", f'{{\n  "model_type": {first},', 1))
    result = fix(source, tmp_path / "out")
    assert bool(result.receipt_path) == safe
    if not safe:
        result = fix(source, tmp_path / "out", unsafe_fixes=["C149"])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(text) and not {
        f.code for f in result.report_after.findings
    } & {"C149", "C150"}
    assert (tmp_path / "out" / "config.json").read_text().count("model_type") == 1


def test_the_commands_of_the_pipelines_page_do_what_it_says(tmp_path, monkeypatch, doctor):
    """Its pre-commit entry and its workflow's line, word for word, on a model that passes and on one that does not."""
    import re
    import shlex
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    hook = re.search(r"entry: doctor (.*)", text)[1]
    workflow = (
        re.search(r"run: doctor (check .*)", text)[1]
        .replace("$GITHUB_STEP_SUMMARY", "summary.md")
        .replace("--group-size 128", "")
    )
    cure = re.search(r"`doctor (check model/ --fix -o fixed/)`", text)[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCTOR_GROUP_SIZE", "32")
    case = tiny()
    case.write(tmp_path / "model")
    assert doctor(*shlex.split(hook))[0] == 0 and doctor(*shlex.split(workflow))[0] == 0
    assert (
        "ready" in (tmp_path / "summary.md").read_text()
        and json.loads((tmp_path / "doctor.sarif").read_text())["version"] == "2.1.0"
    )
    case.config["bos_token_id"] = "1"
    case.write(tmp_path / "model")
    code, out, _ = doctor(*shlex.split(hook))
    assert code == 1 and "C106" in out and doctor(*shlex.split(workflow))[0] == 1
    assert doctor(*shlex.split(cure))[0] == 0 and Checkpoint.open("fixed").value("config.json")["bos_token_id"] == 1


# the laws of every cure


def every_rule():
    from doctor.lint.engine import load_rules

    return load_rules()


@pytest.mark.parametrize("entry", every_rule(), ids=lambda r: r.code)
def test_a_cure_removes_its_finding_adds_none_and_is_done_once(entry, tmp_path):
    """Cures that change the plan instead of the files are held to the same, by the plan that a quantizer's run would
    make.
    """
    from doctor.fixing.consent import Consent
    from doctor.fixing.plan import make_plan, refuse
    from doctor.lint.testing import shown_by

    for number, (case, healthy) in enumerate(shown_by(sys.modules[entry.module])):
        source = case.write(tmp_path / f"source{number}")
        base = healthy.write(tmp_path / f"base{number}") if healthy is not None else None
        facts = [(s, n, v) for (s, n), v in case.facts.items()]
        kept = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
        try:
            result = fix(
                source,
                tmp_path / f"out{number}",
                case.recipe,
                unsafe_fixes=[entry.code],
                only=[entry.code],
                base=base,
                facts=facts,
            )
        except BadCheckpoint:
            assert base is not None  # an example without weights has no healthy twin to take them from
            continue
        assert {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()} == kept
        in_run = make_plan(
            Checkpoint.open(source),
            case.recipe,
            every_rule(),
            Consent(codes=frozenset([entry.code]), only=frozenset([entry.code]), recipe=True),
            facts=facts,
        )
        refuse(in_run)
        cured = [f for step in in_run.steps for f in step.findings]
        assert not [f for f in in_run.after.findings if f in cured], in_run.after.findings
        if result.plan.steps:
            gone = {(f.subject, f.message) for step in result.plan.steps for f in step.findings}
            again = fix(
                tmp_path / f"out{number}",
                tmp_path / f"again{number}",
                case.recipe,
                unsafe_fixes=[entry.code],
                only=[entry.code],
                base=base,
                facts=facts,
            )
            assert not again.plan.steps and not gone & {(f.subject, f.message) for f in again.report_before.findings}
