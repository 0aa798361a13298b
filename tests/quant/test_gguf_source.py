"""A GGUF file as a source: what convert, quantize and verify read of it is what transformers computes with."""

import json

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.gguf_writer import text
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.recipe import Recipe
from doctor.edits.decoding import decoded
from doctor.edits.gguf_floats import GgufAsFloats
from doctor.lint.tiny_gguf import tiny_gguf
from doctor.model.gguf_tokenizer_json import tokenizer_documents
from doctor.quant.dequantize import as_float, to_torch
from doctor.quant.solve import ggml
from tests.helpers.gguf_models import FAMILIES, model, rows, run

pytestmark = pytest.mark.skipif(not ggml.usable(), reason="needs the native library")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """family -> (source, GGUF file in Q8_0), made once."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            result = run(model(family, folder / "m"), folder / "out", fields={"method": "rtn"})
            made[family] = folder / "m", result.output / "model-Q8_0.gguf"
        return made[family]

    return of


def loaded(checkpoint, name):
    return to_torch(checkpoint.load(name), checkpoint.tensors[name].dtype.name).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_writes_the_checkpoint_that_the_file_stands_for(family, files, tmp_path):
    source, file = files(family)
    done = api.convert(file, tmp_path / "out", "bf16")
    assert done.report.ok and not any(f.severity == "warning" for f in done.report.findings), done.report.findings
    original, out, exact = Checkpoint.open(source), Checkpoint.open(done.output), as_float(Checkpoint.open(file))
    assert set(out.tensors) == set(original.tensors)
    for name in out.tensors:
        assert torch.equal(loaded(out, name), torch.from_numpy(exact.load(name)).bfloat16().float()), name
    assert json.loads((done.receipt).read_text())["steps"][0]["edits"][0]["kind"] == "DecodeGguf"
    before, after = original.value("tokenizer.json"), out.value("tokenizer.json")
    assert after["model"]["vocab"] == before["model"]["vocab"]


def test_transformers_loads_what_was_converted(files, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    _source, file = files("llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    done = api.convert(file, tmp_path / "out", "f16")
    ours = transformers.AutoModelForCausalLM.from_pretrained(done.output, dtype=torch.float32).state_dict()
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        assert torch.equal(values, theirs[name].half().float()), name


def test_rows_are_read_in_any_slices(files):
    """q and k are permuted head by head, so a slice must not depend on where it begins."""
    _source, file = files("llama")
    view = GgufAsFloats(Checkpoint.open(file))
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = view.load(name)
    slabs = np.concatenate([slab.copy() for slab in view.rows(name, 3 * whole.shape[1] * 4)])
    assert np.array_equal(slabs, whole)


def test_quantize_decodes_it_as_it_is_read(files, tmp_path):
    _source, file = files("qwen2")
    result = api.quantize(
        file, tmp_path / "q", Recipe(bits=4, group_size=32), calibration=rows(tmp_path), ignore=["Q"], tune="off"
    )
    assert result.output, [f.message for f in result.report.findings]
    assert any("decoded as they are read" in note for note in result.notes)
    assert (result.output / "tokenizer.json").exists() and result.report.summary["path"]
    report = api.verify(file, result.output, rows=1, context=16, text=rows(tmp_path))
    found = report.extra["comparison"]
    assert 0 < found["quantized"]["perplexity"] < 1e6 if "quantized" in found else report.extra


def test_as_many_bits_in_a_coarser_grid_are_refused(tmp_path):
    source = model("llama", tmp_path / "m")
    file = run(source, tmp_path / "out", "Q4_0", fields={"method": "rtn"}).output / "model-Q4_0.gguf"
    ids = rows(tmp_path)
    refused = api.quantize(file, tmp_path / "q", Recipe(bits=4, group_size=64), calibration=ids, ignore=["Q"])
    assert not refused.output and [f.code for f in refused.report.findings if f.severity == "error"] == ["C147"]
    taken = api.quantize(
        file, tmp_path / "q", Recipe(bits=4, group_size=32, method="rtn"), calibration=ids, ignore=["Q"], tune="off"
    )
    assert taken.output


def test_what_is_not_read_is_said_at_once(files, tmp_path):
    _source, file = files("llama")
    with pytest.raises(PlanRefused, match="has no integer codes on an affine grid"):
        api.convert(file, tmp_path / "out", "awq")
    with pytest.raises(PlanRefused, match="is GGUF; fixes are of safetensors and JSON files"):
        api.quantize(file, tmp_path / "out", Recipe(bits=8, group_size=32), fix=True)
    with pytest.raises(PlanRefused, match="is GGUF; tune reads checkpoints in safetensors"):
        api.tune(_source, file, tmp_path / "out")
    other = tiny_gguf()
    other.keys["general.architecture"] = text("rwkv7")
    folder = other.write(tmp_path / "g")
    with pytest.raises(BadCheckpoint, match="its architecture 'rwkv7' is not read as a model here"):
        decoded(Checkpoint.open(folder))


def test_an_output_may_lie_beside_the_file(files):
    _source, file = files("llama")
    assert api.convert(file, file.parent / "plain", "bf16").report.ok


BYTES = [chr(n) for n in [*range(33, 127), *range(161, 173), *range(174, 256)]]


def metadata(**more):
    tokens = [*BYTES, "Ġ", "Ġa", "ab", "<s>", "[PAD192]"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 5],
        "tokenizer.ggml.merges": ["Ġ a", "a b", "b z", "zz a"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        **{f"tokenizer.ggml.{key}": value for key, value in more.items()},
    }


@pytest.mark.parametrize(("name", "bos"), [("gpt-2", False), ("llama-bpe", True), ("qwen2", False), ("smollm", False)])
def test_a_byte_level_tokenizer_is_made_of_metadata(name, bos):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizer_documents(metadata(pre=name), "m.gguf")
    found = tokenizers.Tokenizer.from_str(json.dumps(made["tokenizer.json"]))
    tokens = found.encode("ab a").tokens
    assert tokens == (["<s>"] if bos else []) + ["ab", "Ġa"]
    assert found.token_to_id("[PAD192]") is None and made["tokenizer_config.json"]["bos_token"] == "<s>"


def test_one_digit_is_one_piece_for_smollm():
    tokenizers = pytest.importorskip("tokenizers")
    ids = {name: tokenizer_documents(metadata(pre=name), "m.gguf")["tokenizer.json"] for name in ("smollm", "gpt-2")}
    cut = {
        name: tokenizers.Tokenizer.from_str(json.dumps(d)).pre_tokenizer.pre_tokenize_str("12")
        for name, d in ids.items()
    }
    assert len(cut["smollm"]) == 2 and len(cut["gpt-2"]) == 1


def test_a_way_to_cut_text_that_is_not_known_is_refused():
    with pytest.raises(BadCheckpoint, match="its pre-tokenizer 'viking' is not read here"):
        tokenizer_documents(metadata(pre="viking"), "m.gguf")


def test_a_file_of_floats_has_nothing_to_decode(tmp_path):
    folder = tiny_gguf().write(tmp_path / "g")
    view, how = decoded(Checkpoint.open(folder))
    assert how.stored == () and view.tensors
    refused = api.quantize(folder, tmp_path / "q", Recipe(bits=8), calibration=rows(tmp_path))
    assert not any(run.crashed for run in refused.report.runs)


def test_kvcache_of_the_file_is_that_of_what_it_was_made_from(files, tmp_path):
    source, file = files("gemma3_text")
    here, there = (api.kvcache(path, context=64, memory=1 << 30).data for path in (file, source))
    assert here["weight_bytes"] == Checkpoint.open(file).total_bytes < there["weight_bytes"]
    for key in ("layers", "windows", "max_positions", "not_predicted"):
        assert here[key] == there[key], key
    assert [s["total_bytes"] for s in here["schemes"]] == [s["total_bytes"] for s in there["schemes"]]
    assert here["fitness"]
    for one, other in zip(here["fitness"], there["fitness"], strict=True):  # Q8_0 moves the error a little
        for width, error in one["errors"].items():
            assert abs(error - other["errors"][width]) <= 0.05 * other["errors"][width], (one["layer"], width)
    measured = api.kvcache(file, measure=True, text=rows(tmp_path), rows=1, measured_context=16).data
    assert "not_measured" not in measured and len(measured["measured"]["schemes"]) > 1
    folder = tiny_gguf()
    folder.keys["general.architecture"] = text("rwkv7")
    with pytest.raises(BadCheckpoint, match="its architecture 'rwkv7' is not read as a model here"):
        api.kvcache(folder.write(tmp_path / "g"))


def test_advise_serves_the_file_or_starts_from_its_numbers(files):
    source, file = files("llama")
    advice = api.advise(file, memory=8 << 30)
    assert advice.runtime == "llama.cpp" and advice.stored_bytes == Checkpoint.open(file).total_bytes
    stored = next(o for o in advice.options if o.scheme == "as stored")
    assert stored.total_bytes == advice.stored_bytes and stored.good and not stored.quantize
    assert stored.serve.startswith(f"llama-server -m {file} ")
    assert {o.scheme for o in advice.options} >= {"as stored", "Q4_0"} and "Q8_0" not in {
        o.scheme for o in advice.options
    }
    other = api.advise(file, memory=8 << 30, runtime="vllm")
    plain = next(o for o in other.options if o.scheme == "16-bit")
    assert plain.quantize == f"doctor convert {file} -o model-Q8_0-16-bit --format bf16"
    assert plain.serve.startswith("vllm serve model-Q8_0-16-bit ")
    assert plain.total_bytes == sum(info.nbytes for info in Checkpoint.open(source).tensors.values())
    assert not any(o.scheme == "W8A16 g64" for o in other.options)  # `quantize` refuses as many bits in longer groups
