"""Fixes that merge a LoRA or DoRA adapter into its base model."""

import json

import numpy as np
import pytest
from fix_cases import adapter, codes

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes, to_bf16
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.edits.kinds import AddLowRank, GrowRows
from doctor.edits.overlay import EditedCheckpoint
from doctor.lint.testing import shard_bytes, tiny


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
    result = fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    result = fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    result = fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    with pytest.raises(PlanRefused, match=r"down_proj\.weight: 1 outputs are all zero after the sum"):
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
    result = fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    result = fix(folder, tmp_path / "out", case.recipe, donor=base)
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
    assert codes(fix(folder, tmp_path / "out", case.recipe, donor=case.write(tmp_path / "base"))) == {"F022"}


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
    result = fix(folder, tmp_path / "out", case.recipe, donor=case.write(tmp_path / "base"))
    assert not result.plan.steps and why in next(f.fix.title for f in result.plan.for_you if f.code == "F022")


def test_an_adapter_that_is_a_pickle_alone_is_not_merged_as_nothing(tmp_path):
    case = tiny("llama")
    folder, _ = adapter(tmp_path / "adapter", case)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    result = fix(folder, tmp_path / "out", case.recipe, donor=case.write(tmp_path / "base"))
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
