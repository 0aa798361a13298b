"""A rehearsal writes the headers and the config that the run writes, and stops where the run stops."""

import json
from dataclasses import replace

import pytest
from healthy_models import save
from tiny_classes import CLASSES, save_class

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.recipe import Recipe
from doctor.core.records import LoadProof
from doctor.evaluate.clients.load_proof import linears_of_class
from doctor.evaluate.clients.rehearsal import rehearse as ask
from doctor.formats.schemes import fields_of
from doctor.plan.loading import load_problem
from doctor.quant.client import Client
from doctor.quant.quantize import quantize
from doctor.quant.rehearsal import rehearse

RECIPE = Recipe(method="rtn", group_size=32, format="compressed-tensors")


@pytest.mark.parametrize(
    "name, recipe",
    [
        ("Qwen2-VL", RECIPE),
        ("HY-V3", RECIPE),  # experts and modules under other names than the class's
        ("gpt-oss", RECIPE),  # experts that stay fused
        ("Granite-MoE", RECIPE),  # experts taken apart
        ("Llama", Recipe(method="rtn", group_size=32, keep=("layers.1.",), bits_for=("down_proj=8",))),
    ],
)
def test_names_shapes_and_config_are_those_of_the_run(name, recipe, tmp_path):
    folder = save_class(CLASSES[name], tmp_path / "m")
    linears = linears_of_class(folder, [n.removesuffix(".weight") for n in Checkpoint.open(folder).tensors])
    client = Client(lambda folder, modules: linears, lambda folder: LoadProof("c"))
    done = quantize(folder, tmp_path / "q", recipe, client=client)
    (tmp_path / "r").mkdir()
    rehearse(Checkpoint.open(folder), recipe, tmp_path / "r", lambda modules: linears)
    ours, theirs = Checkpoint.open(tmp_path / "r"), Checkpoint.open(done.output)
    assert ours.value("config.json") == theirs.value("config.json")
    got, want = ({n: (i.dtype.name, i.shape) for n, i in c.tensors.items()} for c in (ours, theirs))
    assert got == want and [n for n in got if n.endswith(("weight_packed", "qweight"))]
    assert (tmp_path / "r" / "model.safetensors").stat().st_blocks * 512 < 1 << 20  # a hole, whatever the model's size


@pytest.mark.parametrize(
    "name, words",
    [
        ("T5", "is an encoder and a decoder"),
        ("Zamba", r"shared_transf.*: ZambaForCausalLM shares this parameter with layers\.\d+\.shared_transf"),
        (
            "Molmo2",
            r"embed_tokens\.weight: Molmo2TextModel .* makes it of .*wte\.\w*embedding by Concatenate, which is not",
        ),
        (
            "Ernie4.5-VL",
            r"text_moe\.gate\.weight: Ernie4_5_VLMoeTextModel .* makes it of .*mlp\.gate\.weight by Transpose",
        ),
    ],
)
def test_what_stops_a_run_stops_its_rehearsal(name, words, tmp_path):
    folder = save_class(CLASSES[name], tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(NotQuantizable, match=words):
        rehearse(checkpoint, Recipe(group_size=32), tmp_path, lambda modules: {})
    # Rounding weights as they are read runs no model, which none of this stops.
    rehearse(checkpoint, Recipe(**fields_of("FP8_DYNAMIC", {})), tmp_path, lambda modules: {})
    stated = Checkpoint.open(tmp_path).value("config.json")["quantization_config"]
    assert stated["format"] == "float-quantized" and stated.get("dequantize") is (True if name == "Zamba" else None)


def test_a_plan_that_packs_nothing_is_refused(tmp_path):
    checkpoint = Checkpoint.open(save("qwen3", tmp_path / "m"))
    with pytest.raises(NotQuantizable, match=r"none of its 36 tensors is a linear of a decoder layer that the plan"):
        rehearse(checkpoint, Recipe(group_size=32, keep=("layers",)), tmp_path, lambda modules: {})


def test_a_lost_tensor_is_named_by_its_parameter(tmp_path):
    checkpoint = Checkpoint.open(save("qwen3", tmp_path / "m"))
    del checkpoint.tensors["model.layers.1.self_attn.q_norm.weight"]
    with pytest.raises(NotQuantizable, match=r"layers\.1\.self_attn\.q_norm\.weight: Qwen3ForCausalLM has this param"):
        rehearse(checkpoint, Recipe(group_size=32), tmp_path, lambda modules: {})


def test_the_clients_answer_on_a_hole_is_its_answer_on_the_file(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("compressed_tensors")
    answers = {
        name: ask(save_class(CLASSES[name], tmp_path / name), RECIPE) for name in ("Qwen2-VL", "Mamba", "GPT-2", "T5")
    }
    assert answers["Qwen2-VL"].proof.whole and answers["Qwen2-VL"].proof.packed == 28
    assert answers["Mamba"].proof.whole and answers["Mamba"].proof.packed == 0  # its class unpacks what it loads
    assert not answers["GPT-2"].proof.whole
    assert "is an encoder and a decoder" in answers["T5"].refused and answers["T5"].advice


def test_experts_that_only_another_engine_reads_are_a_warning_that_names_it():
    experts = LoadProof(
        "transformers 5",
        "GraniteMoeForCausalLM",
        missing=("model.layers.0.block_sparse_moe.experts.gate_up_proj",),
        unexpected=("model.layers.0.block_sparse_moe.experts.0.up_proj.weight_packed",),
    )
    found = load_problem(experts, RECIPE, "granitemoe")
    assert found.severity == "warning" and "vllm can read them" in found.message
    lost = LoadProof("transformers 5", "X", missing=("model.layers.0.self_attn.q_proj.weight",))
    assert load_problem(lost, RECIPE, "granitemoe").severity == "error"
    refused = LoadProof("transformers 5", "X", refused="KeyError: x")
    assert load_problem(refused, RECIPE, "mamba").severity == "error"
    assert load_problem(refused, RECIPE.with_field("runtime", "vllm"), "mamba").severity == "warning"
    assert load_problem(LoadProof("c", reason="absent"), RECIPE, "llama") is None


def test_a_mixture_that_transformers_does_not_read_is_an_error_for_it_alone():
    name = "model.layers.0.mlp.experts.0.up_proj"
    left_out = LoadProof("transformers 5", "X", missing=("model.layers.0.mlp.experts.gate_up_proj",))
    left_out = replace(left_out, unexpected=(f"{name}.qweight", "model.layers.0.mlp.shared_expert_gate.weight"))
    int8 = Recipe(method="rtn", bits=8, group_size=-1, format="int-quantized")
    wrong = LoadProof("transformers 5", "X", misread=(name,))
    scales = LoadProof("transformers 5", "X", unexpected=(f"{name}.input_scale",))
    refused = LoadProof("transformers 5", "X", refused="RuntimeError: x")
    for proof, recipe, says in (
        (left_out, Recipe(), "vllm can read them"),
        (refused, int8, "RuntimeError: x"),
        (wrong, int8, "with wrong values"),
    ):
        found = load_problem(proof, recipe, "qwen2_moe", (f"{name}.weight",))
        assert found.severity == "warning" and says in found.message, found
        found = load_problem(proof, replace(recipe, runtime="transformers"), "qwen2_moe", (f"{name}.weight",))
        assert found.severity == "error", found
    assert load_problem(refused, int8, "llama", ("model.layers.0.mlp.up_proj.weight",)).severity == "error"
    assert load_problem(refused, replace(int8, keep=("experts",)), "qwen2_moe", (f"{name}.weight",)).severity == "error"
    assert "16-bit inputs" in load_problem(scales, int8, "qwen2_moe", ()).message


def test_a_tokenizer_that_the_library_does_not_load_is_said_in_its_words(tmp_path):
    from doctor.api import check
    from doctor.core.errors import BadCheckpoint
    from doctor.core.rehearsal import GIVEN_REHEARSAL
    from doctor.evaluate.clients.rehearsal import rehearse as whole
    from doctor.lint.testing import tiny
    from doctor.quant.calibration.tokenizer import load_tokenizer

    good = tiny().write(tmp_path / "good")
    assert whole(good, RECIPE).tokenizer == ""
    case = tiny()
    case.json["tokenizer.json"]["pre_tokenizer"] = {"type": "NoSuchPreTokenizer"}
    path = case.write(tmp_path / "m")
    found = whole(path, RECIPE)
    assert "untagged enum PreTokenizer" in found.tokenizer
    with pytest.raises(BadCheckpoint, match="the tokenizer cannot be loaded for rows: data did not match"):
        load_tokenizer(Checkpoint.open(path), "rows")
    report = check(path, RECIPE, stage="header", facts=[("checkpoint:", GIVEN_REHEARSAL.name, found)])
    assert "C119" in {f.code for f in report.findings}


@pytest.mark.parametrize("stage, asked", [("listing", 0), ("header", 0), ("values", 1)])
def test_a_check_that_reads_no_weights_rehearses_nothing(stage, asked, tmp_path, monkeypatch):
    from doctor.api import check
    from doctor.evaluate.clients import rehearsal
    from doctor.lint.testing import tiny

    calls = []
    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    monkeypatch.setattr(rehearsal, "start", lambda *given: calls.append(given))
    check(tiny().write(tmp_path / "m"), RECIPE, stage=stage)
    assert len(calls) == asked


def test_a_parameter_that_no_table_knows_is_missed_by_the_class_itself(tmp_path, monkeypatch):
    """No table has GPT-2's head, which is tied unless config.json says otherwise."""
    from doctor.api import check

    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    folder = save("gpt2", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    found = {f.code: (f.severity, f.message) for f in check(folder, Recipe(goal="none")).findings}
    assert found["F078"][0] == "error" and found["F078"][1].endswith("without 1 of its parameters, lm_head.weight")
    assert "G321" not in found  # nothing is to be quantized


def test_what_transformers_reads_not_is_an_error_for_it_alone(tmp_path):
    from doctor.api import check
    from doctor.core.rehearsal import GIVEN_REHEARSAL, Rehearsal
    from doctor.lint.testing import tiny, tiny_gptq

    path, packed = tiny().write(tmp_path / "m"), tiny_gptq().write(tmp_path / "q")
    for source, severities in (
        (LoadProof("transformers 5", "X", mismatched=("a.weight",)), {"": "error", "vllm": "warning"}),
        (LoadProof("transformers 5", "X", refused="ValueError: no"), {"transformers": "error", "vllm": "warning"}),
        (
            LoadProof("transformers 5", "X", unexpected=("mtp.weight",)),
            {"": None, "transformers": None},
        ),  # F052 judges those
        (LoadProof("transformers 5", "X", reason="a library is not here"), {"": None}),
    ):
        for runtime, severity in severities.items():
            facts = [("checkpoint:", GIVEN_REHEARSAL.name, Rehearsal(source=source))]
            report = check(path, Recipe(goal="serve", runtime=runtime), stage="header", facts=facts, select=["F078"])
            assert [f.severity for f in report.findings] == ([severity] if severity else [])
    for source, severity in (
        (LoadProof("transformers 5", "X", unexpected=("mtp.weight",)), None),
        (LoadProof("transformers 5", "X", refused="RuntimeError: no GPU"), None),
        (LoadProof("transformers 5", "X", missing=("a.qweight",), unexpected=("a.weight",)), "error"),
    ):
        facts = [("checkpoint:", GIVEN_REHEARSAL.name, Rehearsal(source=source))]
        report = check(packed, Recipe(goal="serve"), stage="header", facts=facts, select=["F078"])
        assert [f.severity for f in report.findings] == ([severity] if severity else [])
