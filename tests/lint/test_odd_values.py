"""Values of config.json, tokenizer and template that no client can use, each tried in the client that refuses it."""

import json

import pytest
from healthy_models import save

from doctor.api import check
from doctor.core.facts import Unavailable
from doctor.core.recipe import Recipe
from doctor.core.tables import table
from doctor.lint.testing import tiny
from doctor.model.chat_template import parse_template
from doctor.model.spec import build_spec

RECIPE = Recipe(group_size=32)


def said(case, folder):
    report = check(case.write(folder), case.recipe)
    assert not report.crashed, [r.crashed for r in report.crashed]
    return [(f.code, f.severity) for f in report.findings if not f.consequence_of]


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def runs(folder):
    """Whether transformers loads this checkpoint and computes finite logits from finite frequencies.

    The logits alone do not show a rope base of 0: attention drops what is NaN, on a CPU.
    """
    import torch
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(torch.arange(1, 9)[None]).logits
        return all(bool(x.isfinite().all()) for x in (logits, model.model.rotary_emb.inv_freq))
    except Exception:
        return False


REFUSED = [
    ("C164", {"rope_parameters": {"rope_type": "yarnn", "rope_theta": 10000.0}}),
    ("C165", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}),
    ("C165", {"rms_norm_eps": -1.0}),
    ("C165", {"rms_norm_eps": "1e-6"}),
    ("C145", {"layer_types": ["full_attention", "ful_attention", "full_attention"]}),
    ("C166", {"model_type": "llamaa"}),
]


@pytest.mark.parametrize("code, values", REFUSED, ids=[f"{c} {v}" for c, v in REFUSED])
def test_what_the_rule_calls_impossible_fails_in_transformers(code, values, tmp_path):
    folder = save("llama", tmp_path)
    assert runs(folder)
    edited(folder, **values)
    found = [f.code for f in check(folder, RECIPE).findings if f.severity != "info" and not f.consequence_of]
    assert found == [code] and not runs(folder)


CONSTANTS = [
    ({"rms_norm_eps": 0}, ("C165", "warning")),
    ({"rms_norm_eps": 1e-5}, None),
    ({"rope_theta": -10000.0}, ("C165", "error")),
    ({"rope_theta": float("inf")}, ("C165", "error")),
    ({"rope_theta": 500000}, None),
    ({"max_position_embeddings": 0}, ("C165", "error")),
    ({"rms_norm_eps": 1.0}, ("C165", "warning")),
    ({"rms_norm_eps": 1e-3}, None),
    ({"partial_rotary_factor": 1.5}, ("C165", "error")),
    ({"partial_rotary_factor": 1.0}, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2}}, ("C165", "error")),
    ({"layer_types": ["full_attention", "ful_attention"]}, ("C145", "error")),
    ({"layer_types": ["full_attention", None]}, ("C145", "error")),
    ({"layer_types": ["attention", "linear_attention"]}, None),
    ({"rope_scaling": {"rope_type": "axial"}}, None),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, None),
    ({"rope_scaling": {"type": 7}}, ("C164", "warning")),
]


@pytest.mark.parametrize("values, expected", CONSTANTS, ids=[str(v) for v, _e in CONSTANTS])
def test_constants_and_rope_types_at_their_edges(values, expected, tmp_path):
    case = tiny("llama")
    case.config.update(values)
    found = [f for f in said(case, tmp_path) if f[0] not in ("C151", "C160")]
    assert found == ([expected] if expected else [])


CLASSES = [
    ({"model_type": "llama", "architectures": ["LlamaForCasualLM"]}, "warning", "LlamaForCausalLM"),
    ({"model_type": "lama", "architectures": ["LlamaForCausalLM"]}, "warning", "llama"),
    ({"model_type": "qwen2", "architectures": ["LlamaForCausalLM"]}, "warning", None),
    ({"model_type": "llama", "architectures": ["BertForMaskedLM"]}, "warning", None),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}, "info", None),
    ({"model_type": "llama", "architectures": ["LLaMAForCausalLM"]}, None, None),
    ({"model_type": "internlm3", "architectures": ["InternLM3ForCausalLM"]}, None, None),
    (
        {"model_type": "llamaa", "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoConfig": "o/r--c.C"}},
        None,
        None,
    ),
    ({"model_type": "eagle", "architectures": ["EagleLlamaForCausalLM"]}, None, None),
]


@pytest.mark.parametrize("values, severity, right", CLASSES, ids=[str(v["architectures"]) for v, _s, _r in CLASSES])
def test_class_and_model_type(values, severity, right, tmp_path):
    case = tiny("llama")
    case.config.update(values)
    report = check(case.write(tmp_path), case.recipe)
    found = [f for f in report.findings if f.code == "C166"]
    if severity is None and values["model_type"] != "internlm3":
        assert found == []
    elif values["model_type"] == "internlm3":  # custom code's class, stated without the code
        assert [f.severity for f in found] in ([], ["info"])
    else:
        [only] = found
        assert only.severity == severity
        assert [e.value for e in only.fix.edits] == ([right] if right else [])


def test_every_pair_of_transformers_auto_classes_is_silent():
    """The type and the class of each entry of the auto mappings, through the rule itself."""
    from doctor.rules.c166_unknown_class import unknown_class
    from transformers.models.auto import modeling_auto

    loud = []
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for kind, classes in mapping.items():
                for architecture in [classes] if isinstance(classes, str) else classes:
                    config = {"model_type": kind, "architectures": [architecture]}
                    loud += [(kind, architecture) for _f in unknown_class(None, config, build_spec(config, {}))]
    assert loud == []


def test_the_table_of_classes_is_that_of_the_installed_transformers():
    import list_classes
    import transformers

    installed = ".".join(transformers.__version__.split(".")[:2])
    if table("classes")["transformers"] != installed:
        pytest.skip(f"the table is of transformers {table('classes')['transformers']}, {installed} is installed")
    assert list_classes.main(["--check"]) == 0


MESSAGES = [{"role": "user", "content": "hello"}]
TEMPLATES = {
    "{{ messages | shout }}": "no filter 'shout'",
    "{% if messages is wild %}x{% endif %}": "no test 'wild'",
    "{{ shout(messages) }}": "no function 'shout'",
    "{{ messages.__class__.__mro__ }}": "the sandbox refuses the attribute",
    "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}": "the sandbox refuses append()",
    "{% include 'other.jinja' %}": "other templates cannot be loaded",
}
SOUND = [
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m.content|trim }}{% endfor %}",
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ ns.last }}{{ messages[0].content.split('x')[0].strip('\n') }}",
    "{% macro say(x, depth=0) %}{% if x is mapping %}{% for k, v in x|items %}{{ k }}{{ say(v, depth + 1) }}"
    "{% endfor %}{% else %}{{ x | tojson(indent=2) }}{% endif %}{% endmacro %}{{ say(messages[0]) }}"
    "{{ strftime_now('%Y') }}",
    "{% if not messages %}{{ raise_exception('none') }}{% endif %}{% for m in messages %}{% if loop.first %}"
    "{% continue %}{% endif %}{{ messages|map(attribute='role')|join(', ') }}{% endfor %}{{ range(3)|list }}"
    "{{ dict(a=1) }}",
    "{% if shout is defined %}{{ shout(1) }}{% endif %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
]


def rendered(template):
    """The text that transformers makes of a template, None where it refuses it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        return render_jinja_template([MESSAGES], chat_template=template, bos_token="<s>")
    except Exception:
        return None


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_transformers_refuses_is_found(template, tmp_path):
    case = tiny("llama")
    case.files["chat_template.jinja"] = template.encode()
    report = check(case.write(tmp_path), case.recipe)
    found = [f.message for f in report.findings if f.code == "C117"]
    assert found and all(TEMPLATES[template] in m for m in found) and rendered(template) is None


@pytest.mark.parametrize("template", SOUND)
def test_a_template_that_transformers_renders_is_silent(template, tmp_path):
    case = tiny("llama")
    case.files["chat_template.jinja"] = template.encode()
    assert said(case, tmp_path) == [] and rendered(template) is not None


def test_end_tokens_that_look_like_marks_or_are_listed_are_silent(tmp_path):
    """A mark in the vocabulary that added_tokens does not list, and a word that it does."""
    case = tiny("llama")
    vocabulary = case.json["tokenizer.json"]["model"]["vocab"]
    old = next(t for t, i in vocabulary.items() if i == 50)
    vocabulary["<|im_end|>"] = vocabulary.pop(old)
    case.json["generation_config.json"]["eos_token_id"] = [2, 50]
    assert said(case, tmp_path / "mark") == []
    case = tiny("llama")
    case.json["tokenizer.json"]["added_tokens"].append({"id": 50, "content": "P", "special": False})
    case.json["generation_config.json"]["eos_token_id"] = [2, 50]
    assert said(case, tmp_path / "listed") == []


def test_pickles_are_named_and_never_opened(tmp_path):
    case = tiny("llama")
    bomb = b"\x80\x04cos\nsystem\n(Vtouch " + str(tmp_path / "ran").encode() + b"\ntR."
    for name in ("pytorch_model.bin", "optimizer.pt", "state.pkl"):
        case.files[name] = bomb
    report = check(case.write(tmp_path / "model"), case.recipe)
    [only] = [f for f in report.findings if f.code == "F029"]
    assert only.severity == "info" and all(
        n in only.message for n in ("optimizer.pt", "pytorch_model.bin", "state.pkl")
    )
    assert not (tmp_path / "ran").exists()


def test_code_is_named_where_it_lies_here_or_in_another_repository_and_missed_where_it_is_promised(tmp_path):
    case = tiny("llama")
    case.config["auto_map"] = {"AutoConfig": "org/other--configuration_own.OwnConfig"}
    assert said(case, tmp_path / "other") == [("C167", "info")]
    case.config["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    assert said(case, tmp_path / "absent") == [("C146", "warning")]
    case.files["configuration_own.py"] = b"raise SystemExit('ran')\n"
    assert said(case, tmp_path / "here") == [("C167", "info")]


def test_a_tensor_of_another_number_of_dimensions_is_a_finding(tmp_path):
    case = tiny("llama")
    name = case.name("down")
    case.tensors[name] = case.tensors[name][None]
    report = check(case.write(tmp_path / "m"), case.recipe)
    assert not report.crashed
    assert any(f.code == "F051" and "has 3 dimensions" in f.message for f in report.findings)


def test_an_integer_that_no_float_holds_crashes_no_rule(tmp_path):
    case = tiny("llama")
    case.config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    folder, judged = case.write(tmp_path), 0
    for file in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / file
        whole = json.loads(path.read_text())
        for place in (whole, whole.get("rope_scaling", {})):
            for key in [k for k, v in place.items() if isinstance(v, (int, float))]:
                place[key], kept = 10**400, place[key]
                path.write_text(json.dumps(whole))
                place[key] = kept
                report = check(folder, case.recipe, stage="tokenizer")
                assert not report.crashed, (file, key, [r.crashed for r in report.crashed])
                judged += 1
        path.write_text(json.dumps(whole))
    assert judged > 15


def test_a_template_of_very_many_tokens_is_not_judged():
    with pytest.raises(Unavailable, match=r"more than 20,000 tokens"):
        parse_template("{{a}}" * 800_000)
    assert parse_template("{{a}}" * 2_000)


def test_factors_of_zero_and_groups_of_experts_that_do_not_divide_are_named(tmp_path):
    case = tiny("llama")
    case.config.update({"logits_scaling": 0, "logit_scale": "inv_sqrt_d_model"})  # the second as MPT has it
    assert said(case, tmp_path / "factor") == [("C165", "error")]
    case = tiny("qwen3_moe")
    case.config["n_group"] = 3
    assert said(case, tmp_path / "groups") == [("C172", "error")]


def test_an_expert_that_no_layer_has_is_missing(tmp_path):
    case = tiny("qwen3_moe")
    for name in [n for n in case.tensors if ".experts.1." in n]:
        del case.tensors[name]
    assert {code for code, _severity in said(case, tmp_path)} == {"F050"}


def test_names_of_another_program_are_told_although_its_norms_have_ours(tmp_path):
    case = tiny("llama")
    for name in [n for n in case.tensors if "_proj" in n]:
        values, dtype = case.tensors.pop(name), case.dtypes.pop(name, "BF16")
        if "q_proj" in name:
            own = name.replace("model.layers", "layers").replace("self_attn.q_proj", "attention.wq")
            case.tensors[own], case.dtypes[own] = values, dtype
    assert "F063" in {code for code, _severity in said(case, tmp_path)}


def test_a_routing_bias_that_every_layer_lost_is_named_unless_config_goes_without(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save("deepseek_v3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.endswith("e_score_correction_bias")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for method, expected in ((None, ["F050"] * (len(tensors) - len(kept))), ("greedy", [])):
        report = check(edited(folder, topk_method=method), RECIPE, stage="header")
        assert [f.code for f in report.findings if f.severity == "error"] == expected, method
    assert kept.keys() < tensors.keys()


def test_an_activation_that_no_reader_has_is_named_and_vllm_takes_silu_alone(tmp_path):
    transformers = pytest.importorskip("transformers")
    case = tiny("llama")
    case.config["hidden_act"] = "swiglu"
    assert said(case, tmp_path / "name") == [("C175", "error")]
    with pytest.raises(KeyError, match="swiglu"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "name")
    case.config["hidden_act"] = "gelu"
    assert said(case, tmp_path / "plain") == []
    case.recipe = case.recipe.with_field("runtime", "vllm")
    assert said(case, tmp_path / "vllm") == [("C175", "error")]
    case.config["hidden_act"] = "silu"
    assert said(case, tmp_path / "silu") == []


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma", "olmoe", "granite", "smollm3", "cohere"])
def test_biases_that_a_key_promises_are_asked_of_the_files(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    case = tiny(family)
    case.config["attention_bias"] = True
    assert said(case, tmp_path / "m") == [("F068", "error")]
    _model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    missing = {name for name in info["missing_keys"] if name.endswith("bias")}
    found = next(f for f in check(tmp_path / "m", case.recipe).findings if f.code == "F068")
    assert set(found.evidence["names"]) == missing
