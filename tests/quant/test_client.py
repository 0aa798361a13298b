"""Which Linear modules of a client's class stay plain, and what a run says where the client does not load its
output.
"""

import pytest
from healthy_models import save

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.core.records import LoadProof
from doctor.quant.client import Client, not_packed, plain_linears
from doctor.quant.quantize import quantize
from doctor.report.results import results

RTN = Recipe(method="rtn", format="compressed-tensors", group_size=32)


def test_modules_are_found_under_other_names_of_the_files():
    modules = [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.vision_tower.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    packed = ["language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.1.self_attn.q_proj"]
    assert not_packed(modules, packed) == ["model.vision_tower.layers.0.self_attn.q_proj", "lm_head"]
    assert not_packed(modules, modules[:3]) == ["lm_head"]


def test_a_tower_whose_layers_have_linears_of_the_same_names_stays_plain():
    """PaddleOCR-VL: the file's `model.layers.0` is the client's `model.language_model.layers.0`, not the tower's."""
    tower = [f"model.visual.vision_model.encoder.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.out_proj")]
    text = [f"model.language_model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.o_proj")]
    packed = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    assert not_packed([*tower, *text], packed) == tower


def test_what_the_client_says_it_loads_from_is_believed():
    """HY-V3: the file's `shared_mlp` is the client's `shared_experts`, which no comparison of names can find out."""
    linears = {"model.layers.0.mlp.shared_experts.up_proj": ("model.layers.0.mlp.shared_mlp.up_proj",), "lm_head": ()}
    assert plain_linears(linears, ["model.layers.0.mlp.shared_mlp.up_proj"]) == ["lm_head"]
    assert plain_linears(dict.fromkeys(linears, ()), ["model.layers.0.mlp.shared_experts.up_proj"]) == ["lm_head"]


def test_linears_that_stay_plain_are_excluded_by_the_clients_names(tmp_path):
    save("qwen3", tmp_path / "m")
    client = Client(
        lambda folder, modules: dict.fromkeys(("model.layers.0.mlp.up_proj", "model.tower.proj", "lm_head"), ()),
        lambda folder: LoadProof("c"),
    )
    result = quantize(tmp_path / "m", tmp_path / "q", RTN, client=client)
    config = Checkpoint.open(result.output).value("config.json")
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.tower.proj"] and result.report.ok


def test_an_output_that_the_client_does_not_load_is_an_error_and_stays(tmp_path):
    save("qwen3", tmp_path / "m")
    client = Client(
        lambda folder, modules: {}, lambda folder: LoadProof("c 1", "Qwen3ForCausalLM", missing=("model.x.weight",))
    )
    result = quantize(tmp_path / "m", tmp_path / "q", RTN, client=client)
    assert [f.code for f in result.report.findings] == ["O617"] and not result.report.ok
    assert result.output == tmp_path / "q" and (result.output / "config.json").exists()


def test_a_client_that_cannot_be_asked_is_a_note(tmp_path):
    save("qwen3", tmp_path / "m")
    client = Client(lambda folder, modules: {}, lambda folder: LoadProof("c 1", reason="c 1 has no class X"))
    result = quantize(tmp_path / "m", tmp_path / "q", RTN, client=client)
    assert result.report.ok and "not proved to load: c 1 has no class X" in result.notes
    assert result.report.extra["not_proved"] in dict(results(result.report)).values()


@pytest.mark.parametrize(
    "family, loads", [("qwen3", True), ("gemma3_text", True), ("qwen3_next", True), ("gpt2", False)]
)
def test_transformers_says_which_outputs_load(family, loads, tmp_path, monkeypatch):
    """GPT-2's linears are Conv1D, which compressed-tensors does not replace: its packed file loads nowhere in
    transformers.
    """
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    save(family, tmp_path / "m")
    result = api.quantize(tmp_path / "m", tmp_path / "q", RTN)
    said = [f.code for f in result.report.findings if f.code in ("G322", "G323", "O617")]
    assert said == ([] if loads else ["G323"])  # before any work
    assert (result.output is not None) == loads and (tmp_path / "q").exists() == loads
