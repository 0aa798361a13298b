"""Models as transformers saves them: every linear of every mixture of experts is found, gets its own Hessian and is
quantized.
"""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from healthy_models import save, stacked

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.recipe import Recipe
from doctor.formats.registry import KNOWN
from doctor.lint.testing import encode, tiny
from doctor.model.fused_experts import find_fused_experts, unfuse
from doctor.model.linears import is_router
from doctor.model.spec import build_spec
from doctor.quant import budget
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.forward.skeleton import Skeleton

MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "phimoe",
    "ernie4_5_moe",
    "glm4_moe",
    "hunyuan_v1_moe",
    "minimax_m2",
    "qwen3_5_moe_text",
    "qwen3_next",
]
IN_ONE_TENSOR = ["granitemoe", "gpt_oss", "llama4_text"]


@pytest.fixture
def text(tmp_path):
    """32 rows of 64 random ids."""
    rng = random.Random(0)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(63)]}) for _ in range(32))
    )
    return path


def quantized(family, tmp_path, text, method="gptq", format="", **changes):
    save(family, tmp_path / "m", **changes)
    return api.quantize(
        tmp_path / "m",
        tmp_path / "o",
        Recipe(method=method, group_size=32, format=format),
        calibration=text,
        max_seq_length=64,
    )


@pytest.mark.parametrize(
    "family, method",
    [
        *((f, "gptq") for f in MIXTURES),
        ("mixtral", "awq"),
        ("deepseek_v3", "awq"),
        ("qwen3_next", "awq"),
        ("olmoe", "rtn"),
    ],
)
def test_every_expert_is_quantized_on_what_reached_it(family, method, tmp_path, text):
    done = quantized(family, tmp_path, text, method)
    experts = [line for line in done.linears if ".experts." in line["name"]]
    assert done.output and {line["outcome"] for line in done.linears} == {method} and len(experts) >= 4
    assert not [f for f in done.report.findings if f.severity == "error"]
    if method != "rtn":
        reached = {
            (line["block"], line["name"].split(".experts.")[1].split(".")[0]): line["hessian"]["tokens"]
            for line in experts
        }
        assert len(set(reached.values())) > 1 and all(0 < n < 32 * 64 for n in reached.values())
    stored = Checkpoint.open(done.output).tensors
    assert all(f"{line['name']}.qweight" in stored for line in experts)


@pytest.mark.parametrize(
    "family, method, format",
    [
        *((f, m, "") for f in IN_ONE_TENSOR for m in ("gptq", "awq")),
        ("llama4_text", "gptq", "compressed-tensors"),
        ("granitemoe", "rtn", ""),
    ],
)
def test_experts_in_one_tensor_are_quantized_as_linears_of_their_own_and_read_back(
    family, method, format, tmp_path, text
):
    done = quantized(family, tmp_path, text, method, format=format)
    assert done.output and {line["outcome"] for line in done.linears} == {method} and done.report.ok
    assert not {f.code for f in done.report.findings} & {"G313", "Q416", "Q406"}
    source = Checkpoint.open(tmp_path / "m")
    spec = build_spec(source.value("config.json"), source.tensors)
    view, apart = unfuse(source, spec, done.report.recipe)
    experts = [x for x in apart.linears if x.expert is not None]
    assert len(experts) == 3 * 4 * 3 and {x.name for x in apart.linears} == {line["name"] for line in done.linears}
    if method != "rtn":
        reached = {
            (x["block"], re.search(r"experts\.(\d+)", x["name"])[1]): x["hessian"]["tokens"]
            for x in done.linears
            if ".experts." in x["name"]
        }
        assert len(reached) == 12 and len(set(reached.values())) > 1 and all(0 < n < 32 * 64 for n in reached.values())
    written = Checkpoint.open(done.output)
    read = as_float(written)
    assert (
        not {n for s in find_fused_experts(spec, source.tensors, done.report.recipe) for n in s.tensors}
        & read.tensors.keys()
    )
    for x in experts:
        W = load_tensor(view, x.tensor, torch.float32)
        if method != "awq":  # awq's are scaled
            error = (torch.from_numpy(read.load(x.tensor)) - W).norm() / W.norm()
            assert 0.01 < error < 0.2
        bias = f"{x.name}.bias"
        assert (bias in view.tensors) == (bias in written.tensors) == (family == "gpt_oss")
        if bias in written.tensors:
            assert np.array_equal(written.load(bias), view.load(bias))
    stated = written.value("config.json")["quantization_config"]
    assert (
        not stated.get("dynamic")
        and not stated.get("modules_to_not_convert", ["lm_head"])[1:]
        and all(map(is_router, stated.get("ignore", ["lm_head"])[1:]))
    )
    assert sum(p.stat().st_size for p in done.output.glob("*.safetensors")) < 0.45 * sum(
        p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors")
    )


@pytest.mark.parametrize("family", IN_ONE_TENSOR)
def test_the_output_of_stacks_computes_as_the_model_does(family, tmp_path, text):
    """8 bits are close enough to say that no expert, half or row is in another's place, where tokens choose all
    experts: no choice can flip.
    """
    save(family, tmp_path / "m", num_experts_per_tok=4)
    done = api.quantize(
        tmp_path / "m", tmp_path / "o", Recipe(bits=8, group_size=32), calibration=text, max_seq_length=64
    )
    ids = torch.tensor([list(range(3, 67))])
    logits = []
    for folder in (tmp_path / "m", done.output):
        read = as_float(Checkpoint.open(folder))
        built = Skeleton(read, build_spec(read.value("config.json"), read.tensors))
        built.load_whole()
        with torch.no_grad():
            logits.append(built.model(ids).logits)
    assert (logits[1] - logits[0]).norm() < 0.03 * logits[0].norm()


def test_a_stacked_checkpoint_gives_the_bytes_of_the_same_with_linears_of_their_own(tmp_path, text):
    save("qwen3_5_moe_text", tmp_path / "apart")
    stacked(tmp_path / "apart", tmp_path / "stacked")
    for method in ("gptq", "awq"):
        for name in ("apart", "stacked"):
            recipe = Recipe(method=method, group_size=32)
            done = api.quantize(
                tmp_path / name, tmp_path / f"{name}-{method}", recipe, calibration=text, max_seq_length=64
            )
            assert done.output and not [f for f in done.report.findings if f.severity != "info"]
        ours, theirs = (
            {n: c.load(n).tobytes() for n in c.tensors}
            for c in (Checkpoint.open(tmp_path / f"{n}-{method}") for n in ("stacked", "apart"))
        )
        assert ours == theirs and len([n for n in ours if ".experts." in n]) >= 3 * 4 * 3


def test_stacks_that_no_engine_reads_apart_are_kept_and_said_so_while_the_rest_is_quantized(tmp_path, text):
    done = quantized("gpt_oss", tmp_path, text, format="compressed-tensors")
    kept = {line["name"] for line in done.linears if line["outcome"] == "kept"}
    assert done.output and len(kept) == 6 and sum(line["outcome"] == "gptq" for line in done.linears) == 12
    assert {f.code for f in done.report.findings} >= {"G313", "Q416"}
    assert all(
        "vLLM loads gpt_oss experts as one tensor" in f.message
        for f in done.report.findings
        if f.code in ("G313", "Q416")
    )


@pytest.mark.parametrize(
    "format, said",
    [
        ("gptq", r"-:^model\.layers\.1\.block_sparse_moe\.experts$"),
        ("awq", "model.layers.1.block_sparse_moe.experts"),
        ("compressed-tensors", r"re:^model\.layers\.1\.block_sparse_moe\.experts\."),
    ],
)
def test_stacks_that_the_user_keeps_are_whole_and_no_finding(format, said, tmp_path, text):
    """The config names the module as vLLM does, and for compressed-tensors the linears that would be in it: so vLLM
    0.32 loads all three.
    """
    save("granitemoe", tmp_path / "m")
    recipe = Recipe(group_size=32, format=format, keep=("layers.1.block_sparse_moe",))
    done = api.quantize(tmp_path / "m", tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    source, written = Checkpoint.open(tmp_path / "m"), Checkpoint.open(done.output)
    whole = [n for n in written.tensors if len(written.tensors[n].shape) == 3]
    assert sorted(whole) == [f"model.layers.1.block_sparse_moe.{x}_linear.weight" for x in ("input", "output")]
    assert all(np.array_equal(written.load(n), source.load(n)) for n in whole)
    assert not {f.code for f in done.report.findings} & {"G313", "Q416", "Q406"}
    stated = written.value("config.json")["quantization_config"]
    assert (
        said
        in {
            "gptq": stated.get("dynamic"),
            "awq": stated.get("modules_to_not_convert"),
            "compressed-tensors": stated.get("ignore"),
        }[format]
    )


def test_stacks_that_an_engine_reads_in_all_blocks_or_none_are_kept_as_linears(tmp_path, text):
    """vLLM's Llama 4 takes everything behind the first stack for one; its linears in 16 bits are loaded (run with vLLM
    0.32).
    """
    save("llama4_text", tmp_path / "m")
    done = api.quantize(
        tmp_path / "m",
        tmp_path / "o",
        Recipe(group_size=32, keep=("layers.1.feed_forward.experts",)),
        calibration=text,
        max_seq_length=64,
    )
    written = Checkpoint.open(done.output)
    assert not [n for n in written.tensors if len(written.tensors[n].shape) == 3] and not {
        f.code for f in done.report.findings
    } & {"G313", "Q416", "Q406"}
    kept = {x["name"] for x in done.linears if x["outcome"] == "kept"}
    assert kept == {
        f"model.layers.1.feed_forward.experts.{e}.{r}_proj" for e in range(4) for r in ("gate", "up", "down")
    }
    assert all(written.tensors[f"{name}.weight"].dtype.name == "BF16" for name in kept)
    assert (
        r"-:^model\.layers\.1\.feed_forward\.experts$" in written.value("config.json")["quantization_config"]["dynamic"]
    )


def test_a_module_of_experts_is_named_where_all_of_its_linears_are_kept(tmp_path, text):
    """vLLM asks by the module's name; where one linear of it is quantized, the module is not in 16 bits."""
    save("mixtral", tmp_path / "m")
    for keep, named in (
        ("layers.1.block_sparse_moe", [r"-:^model\.layers\.1\.block_sparse_moe\.experts$"]),
        ("experts.3.", []),
    ):
        recipe = Recipe(method="rtn", group_size=32, keep=(keep,))
        done = api.quantize(tmp_path / "m", tmp_path / f"o{keep}", recipe, calibration=text, max_seq_length=64)
        dynamic = Checkpoint.open(done.output).value("config.json")["quantization_config"]["dynamic"]
        assert [p for p in dynamic if p.endswith("experts$")] == named


def test_experts_of_a_stack_get_their_own_width_by_name(tmp_path, text):
    save("gpt_oss", tmp_path / "m")
    done = api.quantize(
        tmp_path / "m",
        tmp_path / "o",
        Recipe(group_size=32, bits_for=("experts.*.down_proj=8",)),
        calibration=text,
        max_seq_length=64,
    )
    losses = {
        bits: [x["solve"]["loss"] for x in done.linears if x["role"] == "down" and (bits == 8)]
        or [x["solve"]["loss"] for x in done.linears if x["role"] == "gate"]
        for bits in (4, 8)
    }
    assert len(losses[8]) == 12 and max(losses[8]) < min(losses[4]) / 20


@pytest.mark.parametrize("family", IN_ONE_TENSOR)
def test_the_need_of_stacks_is_that_of_their_linears(family, tmp_path):
    source = Checkpoint.open(save(family, tmp_path / "m"))
    spec, recipe = build_spec(source.value("config.json"), source.tensors), Recipe(group_size=32)
    apart, whole = (
        budget.needs(source, spec, replace(recipe, keep=keep), 32, 64) for keep in ((), ("experts", "input_linear"))
    )
    assert apart.hessians == 4 * 256**2  # of down in one expert after the other
    assert apart.block < 0.5 * whole.block and apart.output < 0.45 * whole.output and apart.hidden == whole.hidden


def test_sizes_that_the_models_own_code_cannot_compute_with_are_refused_with_its_words(tmp_path, text):
    with pytest.raises(NotQuantizable, match="DeepseekV3DecoderLayer cannot compute: RuntimeError: The size of tensor"):
        quantized("deepseek_v3", tmp_path, text, num_key_value_heads=2)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_named_linears_get_their_own_width_and_the_config_says_so(format, tmp_path, text):
    save("llama", tmp_path / "m")
    recipe = Recipe(
        group_size=32, format=format, bits_for=("self_attn=8", "layers.{0,2}.*down_proj=8", "layers.2.self_attn=4")
    )
    done = api.quantize(tmp_path / "m", tmp_path / "o", recipe, calibration=text, max_seq_length=64)
    assert done.output
    wide = {line["name"] for line in done.linears if recipe.for_linear(line["name"]).bits == 8}
    assert len(wide) == 10 and "model.layers.2.self_attn.q_proj" not in wide and "model.layers.2.mlp.down_proj" in wide
    worst = {
        bits: max(line["solve"]["loss"] for line in done.linears if (line["name"] in wide) == (bits == 8))
        for bits in (4, 8)
    }
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
        assert any(re.match(p, "model.layers.0.self_attn.qkv_proj") for p in named)  # vLLM joins them
        assert not any(re.match(p, "model.layers.1.mlp.down_proj") for p in named)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits_for": ("q_proj=8",)}, "engines join q, k, v into one linear"),
        ({"bits_for": ("w_proj=8",)}, "--override w_proj: matches none of the"),
        ({"bits_for": ("down_proj=5",)}, "must be PATTERN=BITS with 2, 3, 4 or 8 bits"),
        ({"format": "awq", "bits": 8}, "awq with 8 bits; must be 4"),
        ({"bits_for": ("down_proj=8",), "method": "awq"}, "AWQ has one width for all linears"),
        ({"bits_for": ("down_proj=8",), "format": "awq"}, "AWQ has one width for all linears"),
    ],
)
def test_widths_that_no_reader_would_understand_are_refused(options, words, tmp_path, text):
    save("llama", tmp_path / "m")
    with pytest.raises(DoctorError, match=words):
        api.quantize(
            tmp_path / "m", tmp_path / "o", Recipe(group_size=32, **options), calibration=text, max_seq_length=64
        )


def test_gpt_oss_experts_that_llm_compressor_sorted_into_gate_and_up_compute_as_the_stacks_do(tmp_path):
    """The same names mean halves in GPTQModel's files and gate and up in llm-compressor's, which are
    compressed-tensors.
    """
    source = Checkpoint.open(save("gpt_oss", tmp_path / "m", dtype="float32"))
    spec = build_spec(source.value("config.json"), source.tensors)
    view, apart = unfuse(source, spec, Recipe(group_size=32))
    ids, logits = torch.tensor([list(range(3, 67))]), []

    class Sorted:
        """What a compressed-tensors file of llm-compressor reads back as."""

        format, tensors = KNOWN["compressed-tensors"], view.tensors

        def __getattr__(self, name):
            return getattr(view, name)

        def load(self, name):
            match = re.match(r"(.*experts)\.(\d+)\.(gate|up)_proj\.(weight|bias)$", name)
            if not match:
                return view.load(name)
            both = np.concatenate(
                [view.load(f"{match[1]}.{match[2]}.{role}_proj.{match[4]}") for role in ("gate", "up")]
            )
            return np.ascontiguousarray(both[0 if match[3] == "gate" else 1 :: 2])

    for checkpoint in (source, view, Sorted()):
        built = Skeleton(checkpoint, spec if checkpoint is source else apart)
        built.load_whole()
        with torch.no_grad():
            logits.append(built.model(ids).logits)
    for got in logits[1:]:
        assert (got - logits[0]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_large_biases_of_keys_are_kept_and_do_not_touch_the_codes(tmp_path, text):
    biases = {}
    for size in (0, 50):
        case = tiny("qwen2")
        for name in (case.name("k", block).replace("weight", "bias") for block in (0, 1)):
            half = len(case.tensors[name]) // 2
            biases[name] = case.tensors[name] = encode([size] * half + [-size] * half, "BF16")
        case.write(tmp_path / f"m{size}")
        recipe = Recipe(method="gptq", group_size=32)
        done = api.quantize(tmp_path / f"m{size}", tmp_path / f"o{size}", recipe, calibration=text, max_seq_length=64)
        assert {line["outcome"] for line in done.linears} == {"gptq"}
    plain, large = (Checkpoint.open(tmp_path / out) for out in ("o0", "o50"))
    for name, bias in biases.items():
        assert large.tensors[name].dtype.name == "BF16" and (large.load(name) == bias).all()
    for part in ("qweight", "scales", "qzeros", "g_idx"):
        for role in "qkv":
            name = f"model.layers.0.self_attn.{role}_proj.{part}"
            assert (large.load(name) == plain.load(name)).all(), name
