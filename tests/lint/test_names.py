"""Tensor names are judged by the class that config.json names, and the client of the class has the last word."""

import json
import re

import pytest
from healthy_models import save
from multimodal_models import MODELS, save_multimodal

from doctor.api import check, fix, quantize
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import shard_bytes

RECIPE = Recipe(group_size=32)


def rename(folder, new_name):
    """Give every tensor of a checkpoint in one file the name that new_name says."""
    source = Checkpoint.open(folder)
    tensors = {n: source.load(n) for n in source.tensors}
    dtypes = {new_name(n): source.tensors[n].dtype.name for n in tensors}
    (folder / "model.safetensors").write_bytes(shard_bytes({new_name(n): a for n, a in tensors.items()}, dtypes))
    return folder


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def found(folder, **options):
    report = check(folder, RECIPE, **options)
    assert not report.crashed, [r.crashed for r in report.crashed]
    return [f for f in report.findings if f.severity != "info" and not f.consequence_of]


def loaded(folder):
    """(missing keys, unexpected keys, logits) as transformers loads this checkpoint."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(torch.arange(1, 33)[None]).logits
    return sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), logits


PREFIXES = {
    "bare": lambda n: n.removeprefix("model."),
    "language_model": lambda n: f"language_model.{n}",
    "model.language_model": lambda n: n.replace("model.", "model.language_model.", 1),
    "base_model.model": lambda n: f"base_model.model.{n}",
    "transformer": lambda n: re.sub(r"^model\.", "transformer.", n),
}


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "olmoe"])
def test_a_wrong_prefix_is_one_finding_and_renaming_gives_the_model_back(model_type, kind, tmp_path):
    import torch

    folder = save(model_type, tmp_path / "saved")
    right = loaded(folder)[2]
    rename(folder, PREFIXES[kind])
    [only] = found(folder)
    assert only.code == "F061"
    result = fix(folder, tmp_path / "fixed", RECIPE)
    assert {s.code for s in result.plan.steps} >= {"F061"} and not found(tmp_path / "fixed")
    missing, unexpected, logits = loaded(tmp_path / "fixed")
    assert missing == unexpected == [] and torch.equal(logits, right)


def test_transformers_adds_the_base_prefix_and_takes_no_other(tmp_path):
    """What the rule says of transformers, asked of it."""
    for kind, taken in (("bare", True), ("language_model", False), ("base_model.model", False)):
        folder = rename(save("llama", tmp_path / kind), PREFIXES[kind])
        missing, unexpected, _logits = loaded(folder)
        assert (not missing and not unexpected) is taken, (kind, missing)


def test_an_untied_head_keeps_its_name_in_an_index_too(tmp_path):
    folder = save("llama", tmp_path / "saved", tie=False, max_shard_size="200KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        names = [n for n, file in index["weight_map"].items() if file == shard]
        source = Checkpoint.open(folder)
        data = shard_bytes(
            {n.removeprefix("model."): source.load(n) for n in names},
            {n.removeprefix("model."): "BF16" for n in names},
        )
        (folder / f"new-{shard}").write_bytes(data)
    for shard in set(index["weight_map"].values()):
        (folder / f"new-{shard}").rename(folder / shard)
    index["weight_map"] = {n.removeprefix("model."): file for n, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    [only] = found(folder)
    assert only.code == "F061"
    fix(folder, tmp_path / "fixed", RECIPE)
    assert not found(tmp_path / "fixed") and loaded(tmp_path / "fixed")[:2] == ([], [])


def test_names_that_some_client_takes_are_silent(tmp_path):
    """Bare names under a bare class, in an embedding model, a classifier, and in families whose readers take both."""
    folder = rename(save("llama", tmp_path / "bare"), PREFIXES["bare"])
    edit_config(folder, architectures=["LlamaModel"])
    assert found(folder, select=["F061"]) == []
    folder = rename(save("qwen3", tmp_path / "embedder", tie=True), PREFIXES["bare"])
    (folder / "modules.json").write_text("[]")
    assert found(folder, select=["F061"]) == []
    folder = rename(save("qwen2", tmp_path / "classifier"), PREFIXES["bare"])
    edit_config(folder, architectures=["Qwen2ForSequenceClassification"])
    assert found(folder, select=["F061"]) == []
    for model_type in ("gpt2", "bloom"):
        folder = rename(save(model_type, tmp_path / model_type), lambda n: n.removeprefix("transformer."))
        assert found(folder) == []
    folder = rename(save("opt", tmp_path / "opt"), lambda n: n.removeprefix("model."))
    assert found(folder) == []


@pytest.mark.parametrize("model_type", MODELS)
def test_multimodal_models_as_transformers_saves_them_are_silent(model_type, tmp_path):
    folder = save_multimodal(model_type, tmp_path / "saved")
    assert [f for f in found(folder) if f.code.startswith("F0")] == []


STEMS = {"qwen2_5_vl": "model.", "qwen3_vl": "model.language_model.", "qwen3_5": "model.language_model."}


@pytest.mark.parametrize("kind", ["base_model.model", "bare"])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_multimodal_model_of_wrong_names_is_given_back_its_own(model_type, kind, tmp_path):
    import transformers

    folder = save_multimodal(model_type, tmp_path / "saved")
    names = set(Checkpoint.open(folder).tensors)
    stem = STEMS.get(model_type, "language_model.model.")
    text = re.compile(rf"^{re.escape(stem)}(?!visual|vision)")
    rename(folder, (lambda n: f"base_model.model.{n}") if kind == "base_model.model" else lambda n: text.sub("", n))
    [only] = [f for f in found(folder) if f.code.startswith("F")]
    assert only.code == "F061" and "transformers adds" not in only.message
    load = transformers.AutoModelForImageTextToText.from_pretrained
    assert load(folder, output_loading_info=True)[1]["missing_keys"], "the class took the names as they were"
    fix(folder, tmp_path / "fixed", RECIPE, only=("F061",), fail_on="never")
    info = load(tmp_path / "fixed", output_loading_info=True)[1]
    assert set(Checkpoint.open(tmp_path / "fixed").tensors) == names
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("new", [lambda n: n.removeprefix("model."), lambda n: f"model.{n}"], ids=["less", "more"])
def test_layers_whose_names_differ_from_the_others_are_the_models_own(new, tmp_path):
    import torch

    folder = save("llama", tmp_path / "saved")
    right = loaded(folder)[2]
    rename(folder, lambda n: new(n) if ".layers.1." in n else n)
    [only] = found(folder)
    assert only.code == "F061" and only.message.startswith("9 of ")
    fix(folder, tmp_path / "fixed", RECIPE)
    assert torch.equal(loaded(tmp_path / "fixed")[2], right)


def test_the_layers_of_a_second_model_are_left_alone(tmp_path):
    """A draft model beside the model: its layers have numbers that the model has too."""
    folder = save("llama", tmp_path / "saved")
    source = Checkpoint.open(folder)
    tensors = {n: source.load(n) for n in source.tensors}
    tensors |= {n.replace("model.", "draft.", 1): a for n, a in tensors.items() if ".layers.0." in n}
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors, dict.fromkeys(tensors, "BF16")))
    assert "F061" not in {f.code for f in check(folder, RECIPE).findings}


def test_names_of_another_program_are_no_model_of_the_class(tmp_path):
    """Meta's names, and llama.cpp's: readers of the class find nothing, and doctor called it ready."""
    gguf = {"self_attn.q_proj": "attn_q", "mlp.down_proj": "ffn_down", "model.layers": "blk", "self_attn": "x"}
    for words, program in ((gguf, "llama.cpp"), ({"model.layers": "trunk", "proj": "matrix"}, None)):
        folder = save("llama", tmp_path / str(program))

        def new(name, words=words):
            for ours, theirs in words.items():
                name = name.replace(ours, theirs)
            return name.replace("mlp", "ff")

        [only] = found(rename(folder, new))
        assert only.code == "F063" and (program is None or program in only.message)
        assert not only.fix.edits


def test_a_text_model_under_a_multimodal_class_is_told_that_the_class_is_wrong(tmp_path):
    source = Checkpoint.open(save_multimodal("gemma3", tmp_path / "saved"))
    text = {n: source.load(n) for n in source.tensors if n.startswith("language_model.")}
    names = {n: n.removeprefix("language_model.") for n in text}
    (tmp_path / "saved" / "model.safetensors").write_bytes(
        shard_bytes({names[n]: a for n, a in text.items()}, dict.fromkeys(names.values(), "BF16"))
    )
    [only] = [f for f in found(tmp_path / "saved") if f.code == "F061"]
    assert "'model.' in place of 'language_model.model.' of Gemma3ForConditionalGeneration" in only.message
    assert only.fix.safety == "manual" and not only.fix.edits


def swapped(number_at_the_end):
    """An expert's number behind the linear's name, or behind `weight`, as converters from Megatron write it."""
    template = r"experts.\2.weight\1" if number_at_the_end else r"experts.\2.\1.weight"
    return lambda n: re.sub(r"experts\.(\d+)\.(\w+)\.weight$", template, n)


SPELLINGS = {
    "number at the end": swapped(True),
    "number behind the linear": swapped(False),
    "underscores": lambda n: re.sub(r"layers\.(\d+)\.self_attn\.(\w)_proj\.", r"layers_\1_self_attn_\2_proj_", n),
    "slashes": lambda n: n.replace(".", "/"),
    "words in another order": lambda n: n.replace("input_layernorm.weight", "weight.layernorm_input"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "mixtral"])
def test_misnamed_tensors_are_renamed_and_not_dropped(model_type, kind, tmp_path):
    import torch

    folder = save(model_type, tmp_path / "saved")
    right = loaded(folder)[2]
    names = set(Checkpoint.open(folder).tensors)
    rename(folder, SPELLINGS[kind])
    assert set(Checkpoint.open(folder).tensors) != names
    [only] = found(folder)
    assert only.code == "F062" and only.fix.safety == "safe", (only.code, only.message)
    assert not any("Drop" in type(e).__name__ for f in check(folder, RECIPE).findings if f.fix for e in f.fix.edits)
    fix(folder, tmp_path / "fixed", RECIPE)
    assert not found(tmp_path / "fixed") and set(Checkpoint.open(tmp_path / "fixed").tensors) == names
    missing, unexpected, logits = loaded(tmp_path / "fixed")
    assert missing == unexpected == [] and torch.equal(logits, right)


def test_a_layer_and_an_expert_are_never_taken_for_each_other(tmp_path):
    """Both orders of the two numbers occur here, and 3 experts in 3 layers make every mix of them a name."""
    folder = save("qwen3_moe", tmp_path / "saved")
    rename(folder, lambda n: re.sub(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", r"experts.\2.mlp.layers.\1.", n))
    [only] = found(folder)
    pairs = {e.tensor: e.to for e in only.fix.edits}
    assert pairs["model.experts.2.mlp.layers.0.up_proj.weight"] == "model.layers.0.mlp.experts.2.up_proj.weight"
    assert pairs["model.experts.0.mlp.layers.2.up_proj.weight"] == "model.layers.2.mlp.experts.0.up_proj.weight"


def test_w1_w2_w3_are_paired_where_shapes_tell_the_down_projection(tmp_path):
    import torch

    words = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    folder = save("llama", tmp_path / "saved")
    right = loaded(folder)[2]
    rename(folder, lambda n: re.sub("gate_proj|down_proj|up_proj", lambda m: words[m[0]], n))
    [only] = found(folder)
    assert (only.code, only.fix.safety, only.fix.by_name) == ("F062", "unsafe", False)
    fix(folder, tmp_path / "fixed", RECIPE, unsafe_fixes=True)
    assert torch.equal(loaded(tmp_path / "fixed")[2], right)
    square = save("llama", tmp_path / "square", intermediate_size=128)
    rename(square, lambda n: re.sub("gate_proj|down_proj|up_proj", lambda m: words[m[0]], n))
    report = check(square, RECIPE)
    assert "F062" not in {f.code for f in report.findings}
    assert all(not f.fix.edits for f in report.findings if f.code == "F052" and f.fix)


def test_a_tensor_of_the_right_words_and_the_wrong_shape_is_no_pair(tmp_path):
    folder = save("qwen3_moe", tmp_path / "saved", moe_intermediate_size=96)
    rename(folder, SPELLINGS["number at the end"])
    edit_config(folder, moe_intermediate_size=64)
    assert "F062" not in {f.code for f in check(folder, RECIPE).findings}


@pytest.mark.parametrize(
    "family, form",
    [("gpt_oss", "gptq"), ("granitemoe", "awq"), ("granitemoe", "compressed-tensors"), ("llama4_text", "gptq_v2")],
)
def test_packed_experts_stored_one_by_one_belong_and_transformers_is_told_to_leave_them_out(family, form, tmp_path):
    source = save(family, tmp_path / "m", **({"num_experts_per_tok": 1} if family == "llama4_text" else {}))
    recipe = Recipe(method="rtn", group_size=32, sym=form != "awq", format=form)
    out = quantize(source, tmp_path / "o", recipe).output
    assert "F052" not in {f.code for f in check(out).findings}
    report = check(out, Recipe(goal="serve", runtime="transformers"))
    assert {f.code for f in report.findings if f.severity == "error"} == {"G319"}


def test_a_linear_under_a_name_that_nobody_knows_is_an_error_by_headers_alone(tmp_path):
    folder = rename(save("llama", tmp_path / "m"), lambda name: name.replace("q_proj", "query"))
    found = {f.code: f.severity for f in check(folder, RECIPE, stage="header").findings if not f.consequence_of}
    assert found == {"F062": "error"}
