"""Padding of every form of MLP, of heads and of vocabularies: logits before and after, by the model's own code."""

import json

import numpy as np
import pytest
from healthy_models import save

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.edits.kinds import PadTensor, SetJson
from doctor.edits.overlay import EditedCheckpoint
from doctor.evaluate.proof import prove
from doctor.lint.testing import encode, shard_bytes

TWO = Recipe(group_size=32, tp=2)
# Type -> keys of its MLPs' widths. Conv1D with biases (gpt2), plain with biases (opt, gpt_neox, phi, starcoder2), with
# relu² (nemotron), one norm for attention and MLP (falcon), fused halves (phi3, glm4), experts of three matrices
# (mixtral and below).
WIDTHS = {
    "gpt2": ("n_inner",),
    "gptj": ("n_inner",),
    "opt": ("ffn_dim",),
    "falcon": ("ffn_hidden_size",),
    "gpt_neox": ("intermediate_size",),
    "phi": ("intermediate_size",),
    "starcoder2": ("intermediate_size",),
    "nemotron": ("intermediate_size",),
    "phi3": ("intermediate_size",),
    "glm4": ("intermediate_size",),
    "mixtral": ("intermediate_size",),
    "olmoe": ("intermediate_size",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("moe_intermediate_size",),
}


def is_close(proofs):
    return [p.status for p in proofs] in (["equal"], ["agrees"]) and proofs[0].largest_logit > 0


@pytest.mark.parametrize("kind", WIDTHS)
def test_an_mlp_of_every_form_is_padded_with_its_biases_and_says_what_it_said(tmp_path, kind):
    source = save(kind, tmp_path / "source", **dict.fromkeys(WIDTHS[kind], 96))
    result = fix(source, tmp_path / "out", TWO, unsafe_fixes=("G302",))
    assert {s.code for s in result.plan.steps if s.pads} == {"G302"} and is_close(result.proofs), result.proofs
    out = Checkpoint.open(tmp_path / "out")
    assert all(out.value("config.json")[key] == 128 for key in WIDTHS[kind])
    assert not [f for f in check(tmp_path / "out", TWO).findings if f.code == "G302"]
    old = Checkpoint.open(source)
    biases = [n for n in old.tensors if n.endswith(".bias") and "lm_head" not in n and old.tensors[n].shape == (96,)]
    assert all(out.tensors[n].shape == (128,) for n in biases) and bool(biases) == (
        kind in ("gpt2", "gptj", "opt", "gpt_neox", "phi", "starcoder2")
    )


def test_a_width_that_follows_from_hidden_size_is_not_padded(tmp_path):
    source = save("bloom", tmp_path / "source", hidden_size=96)
    result = fix(source, tmp_path / "out", Recipe(group_size=128, tp=2), unsafe_fixes=True, dry_run=True)
    found = [f for f in result.report_before.findings if f.code == "G302"]
    assert [f.message.split(":")[0] for f in found] == ["in_features of down 384 = 3 × 128"] and not result.plan.steps


def test_stacked_experts_are_padded_in_each_half_of_each_expert(tmp_path):
    """No rule asks for it (a stack stays in 16 bits), but an edit of three axes must be right."""
    source = Checkpoint.open(save("granitemoe", tmp_path / "source", intermediate_size=96))
    stacks = {n: t.shape for n, t in source.tensors.items() if len(t.shape) == 3}
    assert set(stacks.values()) == {(4, 192, 128), (4, 128, 96)}
    edits = [PadTensor(n, 1, 256, blocks=2) if shape[1] == 192 else PadTensor(n, 2, 128) for n, shape in stacks.items()]
    proof = prove(source, EditedCheckpoint(source, [*edits, SetJson("config.json", "/intermediate_size", 128, 96)]))
    assert is_close([proof]), proof
    whole = [
        PadTensor(n, 1, 256, spread=False) if shape[1] == 192 else PadTensor(n, 2, 128) for n, shape in stacks.items()
    ]
    assert (
        prove(source, EditedCheckpoint(source, [*whole, SetJson("config.json", "/intermediate_size", 128, 96)])).status
        == "differs"
    )


# Qwen of the first generation, which transformers has no class for


def qwen1(folder, half):
    """A checkpoint of Qwen 1: c_proj(w1(x) * silu(w2(x))), and an intermediate_size that is twice the MLP's width."""
    rng = np.random.default_rng(2)
    tensors = {
        "transformer.wte.weight": rng.normal(0, 0.1, (96, 128)),
        "lm_head.weight": rng.normal(0, 0.1, (96, 128)),
        "transformer.ln_f.weight": np.ones(128),
    }
    for i in range(2):
        at = f"transformer.h.{i}."
        tensors |= {
            f"{at}ln_1.weight": np.ones(128),
            f"{at}ln_2.weight": np.ones(128),
            f"{at}attn.c_attn.weight": rng.normal(0, 0.1, (384, 128)),
            f"{at}attn.c_attn.bias": rng.normal(0, 0.1, 384),
            f"{at}attn.c_proj.weight": rng.normal(0, 0.1, (128, 128)),
            f"{at}mlp.w1.weight": rng.normal(0, 0.1, (half, 128)),
            f"{at}mlp.w2.weight": rng.normal(0, 0.1, (half, 128)),
            f"{at}mlp.c_proj.weight": rng.normal(0, 0.1, (128, half)),
        }
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        shard_bytes({n: encode(t, "BF16") for n, t in tensors.items()}, dict.fromkeys(tensors, "BF16"))
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["QWenLMHeadModel"],
                "model_type": "qwen",
                "hidden_size": 128,
                "intermediate_size": 2 * half,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "vocab_size": 96,
                "kv_channels": 32,
                "seq_length": 256,
                "layer_norm_epsilon": 1e-6,
                "no_bias": True,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
            },
            indent=2,
        )
    )
    return folder


def qwen1_mlp(checkpoint, block, x):
    """The MLP by its definition in Qwen 1's modeling_qwen.py, in float64. x f64[rows, hidden]."""
    w1, w2, c_proj = (
        from_codes(checkpoint.load(f"transformer.h.{block}.mlp.{n}.weight"), "BF16").astype(np.float64)
        for n in ("w1", "w2", "c_proj")
    )
    gate = x @ w2.T
    return (x @ w1.T * (gate / (1 + np.exp(-gate)))) @ c_proj.T


def test_the_mlp_of_qwen_1_is_padded_and_computes_the_same(tmp_path):
    source = qwen1(tmp_path / "source", 96)
    result = fix(source, tmp_path / "out", TWO, unsafe_fixes=("G302",))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert [s.code for s in result.plan.steps if s.pads] == ["G302"] and after.value("config.json")[
        "intermediate_size"
    ] == 256
    assert [p.status for p in result.proofs] == ["not run"] and "has no model of type 'qwen'" in result.proofs[0].detail
    x = np.random.default_rng(3).normal(0, 1, (16, 128))
    for block in (0, 1):
        assert after.tensors[f"transformer.h.{block}.mlp.c_proj.weight"].shape == (128, 128)
        want, got = qwen1_mlp(before, block, x), qwen1_mlp(after, block, x)
        assert (
            np.isfinite(got).all()
            and np.abs(want).max() > 0.1
            and np.abs(want - got).max() <= 1e-13 * np.abs(want).max()
        )
        kept = from_codes(after.load(f"transformer.h.{block}.attn.c_proj.weight"), "BF16")
        assert (kept == from_codes(before.load(f"transformer.h.{block}.attn.c_proj.weight"), "BF16")).all()


# heads and vocabularies of models by transformers


@pytest.mark.parametrize(
    "kind, heads, kv, want",
    [("qwen3", 4, 2, (8, 2)), ("qwen2", 4, 4, (8, 8)), ("qwen2_moe", 4, 2, (8, 2)), ("mixtral", 4, 1, (8, 1))],
)
def test_heads_of_zeros_with_biases_norms_and_experts(tmp_path, kind, heads, kv, want):
    sizes = {"head_dim": 32} if kind != "qwen2" else {}
    source = save(kind, tmp_path / "source", num_attention_heads=heads, num_key_value_heads=kv, **sizes)
    result = fix(source, tmp_path / "out", Recipe(group_size=-1, tp=8), unsafe_fixes=("G304",))
    document = Checkpoint.open(tmp_path / "out").value("config.json")
    assert {s.code for s in result.plan.steps if s.pads} == {"G304"} and is_close(result.proofs), (
        result.plan.problems,
        result.proofs,
    )
    assert (document["num_attention_heads"], document["num_key_value_heads"]) == want


@pytest.mark.parametrize("kind, tie", [("gpt2", True), ("qwen3", False), ("phi", False)])
def test_rows_for_new_tokens_leave_the_logits_of_the_old(tmp_path, kind, tie):
    source = save(kind, tmp_path / "source", tie=tie)
    tokens = json.loads((source / "tokenizer.json").read_text())
    tokens["added_tokens"].append({"id": 97, "content": "<|tool|>", "special": True})
    (source / "tokenizer.json").write_text(json.dumps(tokens))
    result = fix(source, tmp_path / "out", TWO, unsafe_fixes=("C107",))
    assert {s.code for s in result.plan.steps if s.pads} == {"C107"} and is_close(result.proofs), result.proofs
    assert Checkpoint.open(tmp_path / "out").value("config.json")["vocab_size"] == 128


# widths that a kernel asks for


@pytest.mark.parametrize(
    "kind, key, code",
    [
        ("qwen3_moe", "moe_intermediate_size", "G308"),
        ("mixtral", "intermediate_size", "G308"),
        ("starcoder2", "intermediate_size", "G303"),
        ("phi3", "intermediate_size", "G303"),
    ],
)
def test_an_mlp_is_padded_to_the_tiles_of_a_kernel(tmp_path, kind, key, code):
    source = save(kind, tmp_path / "source", **{key: 96})
    recipe = Recipe(group_size=32, runtime="vllm", runtime_version="0.12.0")
    result = fix(source, tmp_path / "out", recipe, unsafe_fixes=(code,), only=(code,))
    assert {s.code for s in result.plan.steps} == {code} and is_close(result.proofs), (
        result.plan.problems,
        result.proofs,
    )
    assert Checkpoint.open(tmp_path / "out").value("config.json")[key] == 128
    assert code in {f.code for f in result.report_before.findings} and code not in {
        f.code for f in result.report_after.findings
    }
