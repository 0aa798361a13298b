"""GGUF written by quantize: one file that reads back as the model, and that transformers and llama.cpp's rules agree
on.
"""

import json
import re

import numpy as np
import pytest
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable, PlanRefused
from doctor.core.recipe import Recipe
from doctor.formats.registry import KNOWN
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.model.gguf_names import permuted_rows, unpermuted_rows, unwritable
from doctor.model.gguf_rope import rope_factors, scaling_of
from doctor.model.gguf_tokenizer import pre_tokenizer, tokenizer_metadata
from doctor.plan.mixture import planned_types, with_mixture
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.quantize import plan, quantize
from doctor.quant.solve import ggml
from tests.helpers.gguf_models import FAMILIES, model, run

pytestmark = pytest.mark.skipif(not ggml.usable(), reason="needs the native library")


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """family -> (source, output) of rounding to Q8_0, made once."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            result = run(model(family, folder / "m"), folder / "out", fields={"method": "rtn"})
            assert result.output, [f.message for f in result.report.findings]
            made[family] = folder / "m", result.output
        return made[family]

    return of


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(source, result, importance) of a llama in Q4_K_M."""
    folder = tmp_path_factory.mktemp("calibrated")
    source = model("llama", folder / "m")
    return source, run(source, folder / "out", "Q4_K_M", imatrix=folder / "imatrix.gguf"), folder / "imatrix.gguf"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_reads_back_as_the_model(family, rounded):
    source, out = rounded(family)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "doctor.json", "model-Q8_0.gguf"]
    original, read = Checkpoint.open(source), as_float(Checkpoint.open(out))
    assert set(read.tensors) == set(original.tensors)
    for name in read.tensors:
        want, got = load_tensor(original, name).float(), torch.from_numpy(read.load(name))
        assert got.shape == want.shape
        assert float((got - want).norm()) <= 0.01 * float(want.norm()), name
    config, stated = original.value("config.json"), read.value("config.json")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert stated[key] == config[key], key


def values_in(state, name):
    """A tensor of the files in transformers' state, where experts are fused: gate and up of all, then down."""
    expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert is None:
        return state[name]
    fused = state[f"{expert[1]}.{'down' if expert[3] == 'down' else 'gate_up'}_proj"][int(expert[2])]
    half = len(fused) // 2
    return {"gate": fused[:half], "up": fused[half:], "down": fused}[expert[3]]


# transformers (5.24) takes 128 for Qwen 3's head size, whatever the file says, and does not read Mixtral's files. It
# does not read the width of experts either, so those models are given the config that doctor reads.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("qwen3", "mixtral")])
def test_transformers_reads_the_same_weights_from_the_file(family, rounded):
    """transformers' own GGUF loader, whose tables are not ours."""
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    _source, out = rounded(family)
    ours = as_float(Checkpoint.open(out))
    given = {"config": transformers.AutoConfig.for_model(**ours.value("config.json"))} if "moe" in family else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model-Q8_0.gguf", dtype=torch.float32, **given
    ).state_dict()
    for name in ours.tensors:
        assert torch.equal(values_in(theirs, name), torch.from_numpy(ours.load(name))), name


def stored(out, name):
    """(type, bytes) of a tensor in an output."""
    checkpoint = Checkpoint.open(out)
    tensor = checkpoint.gguf[0].tensors[name]
    with checkpoint.open_file(tensor.file) as file:
        return tensor.type, file.read(tensor.begin, tensor.nbytes)


def test_rounding_gives_the_bytes_of_ggml(rounded):
    source, out = rounded("llama")
    kind, words = stored(out, "blk.0.ffn_down.weight")
    W = load_tensor(Checkpoint.open(source), "model.layers.0.mlp.down_proj.weight").float()
    assert kind.name == "Q8_0" and words == bytes(ggml.round_blocks(W, kind).numpy())


def test_feedback_loses_less_than_rounding(calibrated):
    source, result, _imatrix = calibrated
    assert result.output, [f.message for f in result.report.findings]
    assert len(result.linears) == 14
    assert all(r["outcome"] == "gptq" and r["solve"]["loss"] < r["solve"]["rtn_loss"] for r in result.linears)
    kind, words = stored(result.output, "blk.0.ffn_down.weight")
    assert kind.name == "Q5_0"  # 256 does not divide 128
    W = load_tensor(Checkpoint.open(source), "model.layers.0.mlp.down_proj.weight").float()
    assert words != bytes(ggml.round_blocks(W, kind).numpy())


def test_an_interrupted_run_goes_on_to_the_same_bytes(calibrated, tmp_path, monkeypatch):
    from doctor.quant import export

    source, done, _imatrix = calibrated
    whole = done.output / "model-Q4_K_M.gguf"
    write, calls = export.Output.write_part, []

    def stopping(self, name, tensors):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(name)
        write(self, name, tensors)

    monkeypatch.setattr(export.Output, "write_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "b", "Q4_K_M")
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr(export.Output, "write_part", write)
    again = run(source, tmp_path / "b", "Q4_K_M", resume=True).output / "model-Q4_K_M.gguf"
    assert again.read_bytes() == whole.read_bytes()


def test_the_plan_states_the_size_that_is_written(calibrated, tmp_path):
    source, result, _imatrix = calibrated
    recipe = Recipe(**fields_of("Q4_K_M", {}))
    model_bytes = Checkpoint.open(result.output).total_bytes
    planned = plan(source, tmp_path / "p", recipe).need.output
    assert planned == pytest.approx(model_bytes, rel=0.02)


def test_a_mixture_gives_more_bits_where_llama_quantize_does():
    case = tiny("llama")
    recipe = with_mixture(Recipe(**fields_of("Q4_K_M", {})), case.spec)
    types = {t.linear: (t.wanted, t.given) for t in planned_types(recipe, case.spec)}
    assert types["model.layers.0.mlp.down_proj"] == ("Q4_K", "Q5_0")
    assert types["model.layers.1.mlp.down_proj"] == ("Q6_K", "Q8_0")
    assert types["model.layers.1.self_attn.v_proj"] == ("Q6_K", "Q8_0")
    assert types["model.layers.1.self_attn.q_proj"] == ("Q4_K", "Q5_0")
    more = [i for i in range(30) if KNOWN["gguf"].own_bits(4, "down", i, 30, 3) == 6]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]  # as llama-quantize does for 30 layers


def test_rows_of_q_are_permuted_as_the_converter_does():
    from pathlib import Path

    vector = json.loads((Path(__file__).parents[2] / "fixtures" / "vectors" / "gguf_permute.json").read_text())
    order = np.arange(vector["heads"] * vector["head_size"])
    assert permuted_rows(order, vector["heads"]).tolist() == vector["hf_row_of_gguf_row"]
    assert np.array_equal(unpermuted_rows(permuted_rows(order, vector["heads"]), vector["heads"]), order)


def test_scaled_rotations_are_what_transformers_computes():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_theta=500000.0, rope_scaling=scaling, head_dim=64)
    scaled, _factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    assert torch.allclose(plain / torch.tensor(rope_factors(scaling, 500000.0, 64)), scaled, rtol=1e-5)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    "factor, low, high, context, theta",
    [(8, 1, 4, 8192, 5e5), (32, 1, 4, 8192, 5e5), (16, 2, 8, 4096, 1e4), (4, 1, 2, 65536, 1e6)],
)
def test_a_scaled_rotation_is_read_from_its_divisors(factor, low, high, context, theta, dim):
    stated = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    told = np.float32(rope_factors(stated, theta, dim)).tolist()
    found = scaling_of(told, theta, dim)
    assert found is not None and found["factor"] == factor
    assert np.allclose(rope_factors(found, theta, dim), told, rtol=1e-4)
    if low == 1:
        assert found | stated == found


@pytest.mark.parametrize("told", [[1.0] * 32, [float("nan")] * 32, [2.0, 5.0] * 16, [8.0] * 31])
def test_other_divisors_are_no_scaling_of_llama_3(told):
    assert scaling_of(told, 5e5, 64) is None


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path):
    opt = tiny("opt").write(tmp_path / "opt")
    with pytest.raises(PlanRefused, match="OPTForCausalLM is not written as GGUF here"):
        quantize(opt, tmp_path / "out", Recipe(**fields_of("Q8_0", {})))
    with pytest.raises(NotQuantizable, match="WordLevel"):
        run(tiny("llama").write(tmp_path / "words"), tmp_path / "out")
    with pytest.raises(PlanRefused, match="needs a calibrated run of a GGUF scheme"):
        run(opt, tmp_path / "out", fields={"method": "rtn"}, imatrix=tmp_path / "i.gguf")


def test_a_byte_level_tokenizer_that_no_table_knows_is_refused():
    with pytest.raises(NotQuantizable, match="cuts text as no pre-tokenizer"):
        pre_tokenizer(lambda text: [1, 2, 3])


def test_tokens_past_the_embedding_are_refused_and_missing_ones_are_marked(tmp_path):
    checkpoint = Checkpoint.open(model("llama", tmp_path / "m"))
    with pytest.raises(NotQuantizable, match="token id 95, and the embedding has 90 rows"):
        tokenizer_metadata(checkpoint, 90, lambda text: [1])
    found = tokenizer_metadata(checkpoint, 100, lambda text: [1])
    assert found["tokenizer.ggml.token_type"].value[95:] == [1, 5, 5, 5, 5]
    assert found["tokenizer.ggml.tokens"].value[99] == "[PAD99]"
    assert found["tokenizer.ggml.add_bos_token"].value is True


def test_importance_is_written_as_llama_quantize_reads_it(calibrated):
    read = Checkpoint.open(calibrated[2]).gguf[0]
    assert read.whole and read.metadata["general.type"] == "imatrix"
    assert read.metadata["imatrix.chunk_count"] == 1
    assert read.tensors["blk.0.ffn_down.weight.in_sum2"].shape == (1, 128)
    assert read.tensors["blk.0.ffn_down.weight.counts"].shape == (1, 1)
    assert len(read.tensors) == 2 * 14


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_one_tensor_and_routers_stay_in_float32(family, rounded):
    _source, out = rounded(family)
    tensors = Checkpoint.open(out).gguf[0].tensors
    stacks = {name.split(".")[2]: t for name, t in tensors.items() if name.endswith("_exps.weight")}
    assert set(stacks) == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert all(len(t.shape) == 3 and t.shape[0] == 4 and t.type.name == "Q8_0" for t in stacks.values())
    assert {t.type.name for name, t in tensors.items() if ".ffn_gate_inp" in name} == {"F32"}


def test_a_part_of_the_experts_cannot_have_another_type(tmp_path):
    source = model("qwen2_moe", tmp_path / "m")
    with pytest.raises(PlanRefused, match=r"experts\.1\.down_proj: would have 16 bits and .*experts\.0\.down_proj 8"):
        run(source, tmp_path / "out", fields={"method": "rtn"}, keep=["experts.1.down_proj"])
    kept = run(source, tmp_path / "out", fields={"method": "rtn"}, keep=["*.experts.*.down_proj"]).output
    types = {
        name.split(".")[2]: t.type.name for name, t in Checkpoint.open(kept).gguf[0].tensors.items() if "exps" in name
    }
    assert types == {"ffn_gate_exps": "Q8_0", "ffn_up_exps": "Q8_0", "ffn_down_exps": "BF16"}


def test_importance_of_experts_is_written_for_each(tmp_path):
    source = model("mixtral", tmp_path / "m")
    run(source, tmp_path / "out", "Q4_0", imatrix=tmp_path / "imatrix.gguf")
    tensors = Checkpoint.open(tmp_path / "imatrix.gguf").gguf[0].tensors
    assert tensors["blk.0.ffn_gate_exps.weight.in_sum2"].shape == (4, 64)
    assert tensors["blk.0.ffn_gate_exps.weight.counts"].shape == (4, 1)


def test_eight_experts_get_the_types_that_llama_quantize_gives_them():
    own = {name: KNOWN[name].own_bits for name in ("gguf", "gguf-q4_0", "gguf-iq4_xs")}
    assert [own["gguf"](4, role, 3, 32, 4, 8) for role in ("q", "k", "v", "o", "gate")] == [4, 8, 8, 5, 4]
    assert [own["gguf-q4_0"](4, role, 3, 32, 4, 8) for role in ("k", "v", "o")] == [8, 8, 4]
    assert [own["gguf-iq4_xs"](4, role, 3, 32, 4, 8) for role in ("k", "v", "o")] == [8, 8, 5]
    assert own["gguf"](4, "o", 3, 32, 4, 60) == 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "norm_topk_prob is false, and llama.cpp computes this architecture as true"),
        ({"norm_topk_prob": True, "mlp_only_layers": [0]}, "llama.cpp wants experts in every layer"),
    ],
)
def test_a_mixture_that_llama_cpp_would_compute_otherwise_is_refused(more, reason):
    assert reason in unwritable({"architectures": ["Qwen3MoeForCausalLM"], **more})


@pytest.mark.parametrize(
    ("layers", "scale", "reason"),
    [
        (26, 256, ""),
        (26, 168, "query_pre_attn_scalar is 168, and llama.cpp takes 256 in a Gemma 3 of these sizes"),
        (62, 168, ""),
        (62, 128, "query_pre_attn_scalar is 128, and llama.cpp takes 168"),
    ],
)
def test_a_scale_of_attention_that_llama_cpp_does_not_take_is_refused(layers, scale, reason):
    sizes = {"hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128} if layers == 62 else {}
    found = unwritable(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "num_hidden_layers": layers,
            "query_pre_attn_scalar": scale,
            **sizes,
        }
    )
    assert reason in found and bool(found) == bool(reason)
