"""Plain checkpoints as trainers, wrappers and converters leave them, judged as readers of the named class take them.

Tried with transformers 5.24: they do not load, start weights from random numbers, or stop at the first reply.
"""

import numpy as np
import pytest

from doctor.api import check
from doctor.lint.testing import tiny


def findings(case, folder):
    report = check(case.write(folder), case.recipe)
    assert not report.crashed, [r.crashed for r in report.crashed]
    return [(f.code, f.severity, f.message) for f in report.findings if not f.consequence_of]


def test_biases_that_the_class_always_has_are_missed_in_all_layers(tmp_path):
    case = tiny("qwen2")
    for name in [n for n in case.tensors if n.endswith(".bias")]:
        del case.tensors[name], case.dtypes[name]
    found = findings(case, tmp_path)
    assert {code for code, _severity, _message in found} == {"F050"}
    assert len(found) == 6  # query, key and value of two layers


def test_a_class_that_states_that_it_has_no_biases_misses_none(tmp_path):
    case = tiny("qwen2")
    case.config["attention_bias"] = False
    for name in [n for n in case.tensors if n.endswith(".bias")]:
        del case.tensors[name], case.dtypes[name]
    assert "F050" not in {code for code, _severity, _message in findings(case, tmp_path)}


def test_a_rotary_buffer_of_one_layer_is_missed_in_no_other(tmp_path):
    case = tiny("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    case.tensors[name], case.dtypes[name] = np.ones(16, np.float32), "F32"
    assert findings(case, tmp_path) == []


def test_a_transposed_matrix_is_one_finding(tmp_path):
    case = tiny("llama")
    name = case.name("down")
    case.tensors[name] = np.ascontiguousarray(case.tensors[name].T)
    rows, columns = case.tensors[name].shape
    message = f"{name} is [{rows}, {columns}], the transpose of the [{columns}, {rows}] that config.json gives"
    assert findings(case, tmp_path) == [("F051", "error", message)]


@pytest.mark.parametrize("prefix", ["optimizer.exp_avg.", "visual.blocks.0.", "ema."])
def test_tensors_beside_the_model_are_named_by_what_holds_them(prefix, tmp_path):
    case = tiny("llama")
    for name in ("attn.qkv.weight", "attn.proj.weight"):
        case.tensors[prefix + name], case.dtypes[prefix + name] = np.ones((32, 32), np.float32), "F32"
    top = prefix.partition(".")[0] + "."
    first = min(prefix + "attn.qkv.weight", prefix + "attn.proj.weight")
    found = [f for f in findings(case, tmp_path) if f[0] == "F052"]
    assert found == [("F052", "warning", f"2 tensors under {top} do not belong to a llama model; the first is {first}")]


def test_integers_without_scales_are_no_weights(tmp_path):
    case = tiny("llama")
    name = case.name("up")
    case.tensors[name], case.dtypes[name] = np.full(case.tensors[name].shape, 7, np.int8), "I8"
    found = findings(case, tmp_path)
    assert ("C147", "error", f"1 weight is stored in I8 with 0 scale tensors: {name}") in found


@pytest.mark.parametrize("method", ["quark", "vptq", "spqr"])
def test_a_method_whose_files_hold_codes_is_stale_above_plain_weights(method, tmp_path):
    case = tiny("llama")
    case.config["quantization_config"] = {"quant_method": method}
    message = f"quantization_config names {method}, but all {len(case.tensors)} tensors are unquantized"
    assert findings(case, tmp_path) == [("C153", "error", message)]


def test_a_classifier_without_its_head_is_not_ready(tmp_path):
    case = tiny("llama")
    case.config["architectures"] = ["LlamaForSequenceClassification"]
    assert findings(case, tmp_path) == [
        ("F053", "error", "no score.weight, which LlamaForSequenceClassification needs")
    ]


def test_a_classifier_with_its_head_is_sound(tmp_path):
    case = tiny("llama")
    case.config["architectures"] = ["LlamaForSequenceClassification"]
    hidden = case.config["hidden_size"]
    case.tensors["score.weight"], case.dtypes["score.weight"] = np.ones((2, hidden), np.float32) / 64, "F32"
    assert "F053" not in {code for code, _severity, _message in findings(case, tmp_path)}


def test_the_bare_class_above_a_stored_head_is_an_embedding_model_for_vllm(tmp_path):
    case = tiny("mistral")
    case.config["architectures"] = ["MistralModel"]
    (found,) = findings(case, tmp_path)
    assert found[:2] == ("C166", "warning")
    assert "vLLM serves it as an embedding model" in found[2]


def test_each_named_chat_template_is_parsed(tmp_path):
    case = tiny("llama")
    case.json["tokenizer_config.json"]["chat_template"] = [
        {"name": "default", "template": "{{ messages[0]['content'] }}"},
        {"name": "tool_use", "template": "{% for t in tools %}"},
    ]
    found = [f for f in findings(case, tmp_path) if f[0] == "C109"]
    assert len(found) == 1
    assert "'tool_use'" in found[0][2]


def test_a_format_of_another_framework_is_named(tmp_path):
    case = tiny("llama")
    file = case.write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tf"', 1))
    found = [(f.code, f.message) for f in check(file.parent, case.recipe).findings]
    assert found == [("F026", "model.safetensors states the format 'tf' in its metadata; must be 'pt'")]


@pytest.mark.parametrize(
    "values, severity",
    [
        ({"max_new_tokens": 0}, "error"),
        ({"num_return_sequences": 2}, "error"),
        ({"early_stopping": "x"}, "error"),
        ({"do_sample": True, "temperature": 0.0}, "warning"),
        ({"do_sample": True, "temperature": "0.7"}, "warning"),
        ({"do_sample": True, "top_k": 2.5}, "warning"),
        ({"do_sample": True, "min_p": 2}, "warning"),
        ({"repetition_penalty": 0.0}, "warning"),
        ({"max_length": 0}, "warning"),
        ({"num_beams": 0}, "warning"),
    ],
)
def test_values_that_generation_refuses(values, severity, tmp_path):
    case = tiny("llama")
    case.json["generation_config.json"] |= values
    assert [f[:2] for f in findings(case, tmp_path)] == [("C169", severity)]


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "temperature": 2.0},
        {"num_return_sequences": 2, "num_beams": 2},
        {"early_stopping": "never", "max_length": 20, "repetition_penalty": 1},
    ],
)
def test_values_that_generation_takes(values, tmp_path):
    case = tiny("llama")
    case.json["generation_config.json"] |= values
    assert findings(case, tmp_path) == []


def test_a_second_save_of_the_whole_model_is_one_finding_and_the_usual_name_stays(tmp_path):
    from doctor.api import fix
    from doctor.report.plan_text import render_plan

    case = tiny("llama")
    folder = case.write(tmp_path / "twice")
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    count = len(case.tensors)
    found = [f.message for f in check(folder, case.recipe).findings]
    first = min(case.tensors)
    assert found == [f"{count} tensors are in model.fp16.safetensors and model.safetensors alike; the first is {first}"]
    done = fix(folder, tmp_path / "once", case.recipe)
    assert f"model.fp16.safetensors: {count} copies dropped" in render_plan(done)
    assert (tmp_path / "once" / "model.safetensors").exists()
    assert not (tmp_path / "once" / "model.fp16.safetensors").exists()
