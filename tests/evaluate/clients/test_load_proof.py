"""The load proof: transformers itself says whether it loads a checkpoint whole, on the meta device."""

import json
import os
from importlib.resources import files
from unittest import mock

import jsonschema
import pytest
import torch
from healthy_models import save
from safetensors.torch import load_file, save_file

from doctor.core.recipe import Recipe
from doctor.evaluate.clients.load_proof import as_record, prove_loading
from doctor.evaluate.verify import verify
from doctor.quant.quantize import quantize
from doctor.report import render

pytest.importorskip("accelerate")  # transformers asks for it where a device is named
needs_compressed_tensors = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("compressed_tensors"), reason="compressed-tensors is not installed"
)


SCHEMA = json.loads(files("doctor.report.formats").joinpath("schema.json").read_text())


def rename(folder, change):
    """The same tensors under other names; None drops one."""
    tensors = load_file(folder / "model.safetensors")
    changed = {change(name): tensor for name, tensor in tensors.items()}
    save_file({n: t for n, t in changed.items() if n}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ("qwen3", "gemma3_text", "qwen3_moe"))
def test_what_transformers_saved_it_loads_whole(family, tmp_path):
    save(family, tmp_path / "m")
    proof = prove_loading(tmp_path / "m")
    assert proof.whole and proof.architecture.endswith("ForCausalLM") and proof.packed == 0, proof


def test_a_tensor_that_is_not_there_and_one_that_nobody_asks_for_are_named(tmp_path):
    save("qwen3", tmp_path / "m")
    rename(tmp_path / "m", lambda n: n.replace("layers.1.mlp.down_proj", "layers.1.mlp.down"))
    proof = prove_loading(tmp_path / "m")
    assert proof.missing == ("model.layers.1.mlp.down_proj.weight",) and not proof.whole
    assert proof.unexpected == ("model.layers.1.mlp.down.weight",)


def test_a_class_that_no_library_has_is_not_judged(tmp_path):
    save("qwen3", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysModel"]}))
    proof = prove_loading(tmp_path / "m")
    assert "has no class NobodysModel" in proof.reason and not proof.whole


def test_code_of_the_checkpoint_is_not_run(tmp_path):
    save("qwen3", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(f"open({os.fspath(tmp_path / 'ran')!r}, 'w')\n")
    proof = prove_loading(tmp_path / "m")
    assert not proof.whole and (proof.refused or proof.reason) and not (tmp_path / "ran").exists()


@needs_compressed_tensors
def test_our_compressed_tensors_file_loads_whole_with_equal_weights(tmp_path):
    save("qwen3", tmp_path / "m")
    recipe = Recipe(method="rtn", format="compressed-tensors", group_size=32)
    quantize(tmp_path / "m", tmp_path / "q", recipe)
    proof = prove_loading(tmp_path / "q")
    assert proof.whole and proof.packed == 21 and proof.compared == 3, proof
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("weight_shape"))
    words = tensors[name.replace("weight_shape", "weight_packed")]
    assert words.dtype == torch.int32


@needs_compressed_tensors
def test_experts_that_transformers_unpacks_to_other_values_are_named(tmp_path, monkeypatch):
    """It joins experts without their weight_global_scale: 24 of 24 matrices of this model come out wrong."""
    save("mixtral", tmp_path / "m", num_hidden_layers=1)
    for form, group, wrong in (("nvfp4-pack-quantized", 16, 4), ("mxfp4-pack-quantized", 32, 0)):
        quantize(tmp_path / "m", tmp_path / form, Recipe(method="rtn", format=form, group_size=group))
        proof = prove_loading(tmp_path / form)
        assert (proof.compared, len(proof.misread), proof.differing) == (3 + 4, wrong, ()), proof
        assert proof.whole == (not wrong) and all(".experts." in name for name in proof.misread)


@needs_compressed_tensors
def test_words_beside_rounded_inputs_are_unpacked_by_the_format_that_the_file_names(tmp_path):
    save("qwen3", tmp_path / "m", num_hidden_layers=1)
    recipe = Recipe(method="rtn", format="compressed-tensors", group_size=32, activations="fp8")
    quantize(tmp_path / "m", tmp_path / "q", recipe)
    proof = prove_loading(tmp_path / "q")
    assert proof.whole and proof.compared == 3, proof


def test_a_client_that_hangs_is_ended(tmp_path):
    save("qwen3", tmp_path / "m")
    assert "had not loaded it after" in prove_loading(tmp_path / "m", seconds=0.05).reason


@needs_compressed_tensors
def test_verify_says_that_the_client_loads_it(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(32)]}) + "\n" for i in range(4))
    )
    save("qwen3", tmp_path / "m")
    quantize(tmp_path / "m", tmp_path / "q", Recipe(method="rtn", format="compressed-tensors", group_size=32))
    report = verify(tmp_path / "m", tmp_path / "q", text=rows, context=32, rows=2, load_proof=True)
    jsonschema.validate(json.loads(render("json", [report])), SCHEMA)
    assert "loads every parameter as Qwen3ForCausalLM" in render("full", [report])


def test_fix_lets_the_client_load_what_it_wrote(tmp_path, monkeypatch):
    from doctor.api import fix

    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    save("qwen3", tmp_path / "m")
    rename(tmp_path / "m", lambda n: n.removeprefix("model."))
    result = fix(tmp_path / "m", tmp_path / "out", Recipe(group_size=32))
    assert [s.code for s in result.plan.steps if s.code == "F061"] and result.report.ok
    assert any("loads it whole as Qwen3ForCausalLM" in str(note) for note in result.notes), result.notes

    from doctor.core.records import LoadProof
    from doctor.evaluate.clients import load_proof

    wrong = LoadProof("transformers 5", "Qwen3ForCausalLM", missing=("model.norm.weight",))
    monkeypatch.setattr(load_proof, "prove_loading", lambda folder: wrong)
    result = fix(tmp_path / "m", tmp_path / "again", Recipe(group_size=32))
    assert "O617" in {f.code for f in result.report.findings} and not result.report.ok


def test_transformers_loads_shapes_and_types_and_reads_no_value(tmp_path):
    """A mixture, whose experts transformers joins: its loader sees tensors on the meta device alone."""
    import torch
    from safetensors import safe_open
    from transformers import core_model_loading as loading

    from doctor.evaluate.clients import transformers_child as child

    folder = save("qwen3_moe", tmp_path / "m")
    read = loading._materialize_copy
    with safe_open(folder / "model.safetensors", framework="pt") as file, child.values_left_out() as patched:
        name = "model.embed_tokens.weight"
        seen = loading._materialize_copy(file.get_slice(name), torch.device("cpu"), torch.float32)
        assert patched and seen.is_meta and seen.dtype == torch.float32
        assert list(seen.shape) == file.get_slice(name).get_shape()
    assert loading._materialize_copy is read
    answer = child.ask(folder, 0, None)
    assert answer["missing"] == answer["unexpected"] == answer["mismatched"] == []
    case = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts.1.up_proj" not in n}
    save_file(case, folder / "model.safetensors", metadata={"format": "pt"})
    assert child.ask(folder, 0, None).get("missing") or child.ask(folder, 0, None)["kind"] == "refused"


def test_files_that_the_machine_cannot_map_say_nothing_against_them(tmp_path, monkeypatch):
    from doctor.evaluate.clients import transformers_child as child

    folder = save("llama", tmp_path / "m")
    for error in (RuntimeError("unable to mmap 9 bytes from file <m>: Cannot allocate memory (12)"), MemoryError()):
        monkeypatch.setattr(child, "load_headers", mock.Mock(side_effect=error))
        proof = as_record(child.ask(folder, 0, None), (), 0)
        assert not proof.refused and "this machine does not let" in str(proof.reason)


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    from doctor.evaluate.clients import transformers_child as child

    folder = save("llama", tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=AssertionError("opened")))
    assert "model.safetensors" in child.ask(folder, 0, None)["error"]
