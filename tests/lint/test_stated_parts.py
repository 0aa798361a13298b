"""Packed checkpoints whose quantization_config states other tensors than the files hold, each as a report had it."""

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint.directory import Checkpoint
from doctor.formats.registry import KNOWN
from doctor.lint.testing import tiny, tiny_gptq, tiny_packed

DOWN = "model.layers.0.mlp.down_proj"
K = "model.layers.0.self_attn.k_proj"
DYNAMIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def stated(case):
    return case.config["quantization_config"]


def group(case):
    return stated(case)["config_groups"]["group_0"]


def put(case, name, values, dtype):
    case.tensors[name], case.dtypes[name] = values, dtype


def drop(case, name):
    del case.tensors[name], case.dtypes[name]


def eight_bits(inputs=None, strategy="channel", block=None):
    """tiny() in compressed-tensors' FP8."""
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        shape = {"channel": (n, 1), "tensor": (1,), "block": (-(-n // 32), -(-k // 32))}[strategy]
        put(case, linear.tensor, rng.integers(1, 0x78, (n, k), np.uint8), "F8_E4M3")
        put(case, f"{linear.tensor}_scale", np.full(shape, 0.01, np.float32), "F32")
        if inputs is STATIC:
            put(case, f"{linear.name}.input_scale", np.full(1, 0.02, np.float32), "F32")
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "block_structure": block}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    return case


def said(case, folder, runtime="vllm", code=""):
    report = check(case.write(folder), case.recipe.with_field("goal", "serve").with_field("runtime", runtime))
    assert not report.crashed, [run.crashed for run in report.crashed]
    return [
        (f.severity, f.code, f.message)
        for f in report.findings
        if f.code != "C147" and not f.consequence_of and f.code.startswith(code)
    ]


HEALTHY = {
    "packed": tiny_packed,
    "packed, by pattern": lambda: tiny_packed(targets=["re:.*(self_attn|mlp).*"]),
    "nvfp4": lambda: tiny_packed("nvfp4-pack-quantized"),
    "fp8 rows": lambda: eight_bits(DYNAMIC),
    "fp8 tensor": lambda: eight_bits(DYNAMIC, "tensor"),
    "fp8 static": lambda: eight_bits(STATIC, "tensor"),
    "fp8 blocks": lambda: eight_bits(DYNAMIC, "block", [32, 32]),
    "gptq": tiny_gptq,
    "gptq v2": lambda: tiny_gptq(version="gptq_v2"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_files_have_what_they_state(name, tmp_path):
    found = said(HEALTHY[name](), tmp_path)
    assert not [line for line in found if line[1].startswith("O") and line[0] != "info"], found


def no_zero_points(case):
    group(case)["weights"]["symmetric"] = False


def zero_points(case):
    for name in [n for n in case.tensors if n.endswith("weight_packed")]:
        put(case, name.replace("weight_packed", "weight_zero_point"), np.zeros((8, 2), np.int32), "I32")


def flat_scale(case):
    case.tensors[f"{DOWN}.weight_scale"] = case.tensors[f"{DOWN}.weight_scale"].reshape(-1)


def other_strategy(case):
    group(case)["weights"]["strategy"] = "tensor"


def static_without_scales(case):
    group(case)["input_activations"] = STATIC


def dynamic_with_scales(case):
    group(case)["input_activations"] = DYNAMIC


def wide_words(case):
    name = f"{DOWN}.weight_packed"
    put(case, name, case.tensors[name].astype(np.int64), "I64")


def other_eight_bits(case):
    case.dtypes[f"{DOWN}.weight"] = "F8_E5M2"


def halved_block(case):
    group(case)["weights"]["block_structure"] = [16, 16]


def no_shape(case):
    drop(case, f"{DOWN}.weight_shape")


@pytest.mark.parametrize(
    ("maker", "change", "message"),
    [
        (
            tiny_packed,
            no_zero_points,
            f"14 linears have no weight_zero_point (first {DOWN}.weight_zero_point); symmetric false asks for it",
        ),
        (
            tiny_packed,
            zero_points,
            f"14 linears have weight_zero_point (first {DOWN}.weight_zero_point); by symmetric true readers have no "
            "parameter for it",
        ),
        (
            lambda: eight_bits(DYNAMIC),
            flat_scale,
            f"1 tensor weight_scale is not as stated: {DOWN}.weight_scale is [64]; strategy channel asks for [64, 1]",
        ),
        (
            lambda: eight_bits(DYNAMIC),
            other_strategy,
            f"14 tensors weight_scale are not as stated: {DOWN}.weight_scale is [64, 1]; strategy tensor asks for [1]",
        ),
        (
            lambda: eight_bits(DYNAMIC, "tensor"),
            static_without_scales,
            f"14 linears have no input_scale (first {DOWN}.input_scale); input_activations dynamic false asks for it",
        ),
        (
            lambda: eight_bits(STATIC, "tensor"),
            dynamic_with_scales,
            f"14 linears have input_scale (first {DOWN}.input_scale); by input_activations dynamic true readers have "
            "no parameter for it",
        ),
        (
            tiny_packed,
            wide_words,
            f"1 tensor weight_packed is not as stated: {DOWN}.weight_packed is I64; num_bits 4 asks for I32",
        ),
        (
            lambda: eight_bits(DYNAMIC),
            other_eight_bits,
            f"1 tensor weight is not as stated: {DOWN}.weight is F8_E5M2; type float asks for F8_E4M3",
        ),
        (
            lambda: eight_bits(DYNAMIC, "block", [32, 32]),
            halved_block,
            f"14 tensors weight_scale are not as stated: {DOWN}.weight_scale is [2, 4]; block_structure [16, 16] asks "
            "for [4, 8]",
        ),
        (
            tiny_packed,
            no_shape,
            f"1 linear has no weight_shape ({DOWN}.weight_shape); format pack-quantized asks for it",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_part_that_is_not_as_stated_is_named_with_what_asks_for_it(maker, change, message, tmp_path):
    case = maker()
    change(case)
    severity = "warning" if " is I64; " in message else "error"  # readers copy words in 64 bits over
    assert (severity, "O650", message) in said(case, tmp_path)


def sparse(kind):
    return {"sparsity_config": {"format": kind, "targets": ["Linear"], "ignore": []}}


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize(
    ("maker", "values", "message"),
    [
        (tiny_packed, sparse("dense"), "sparsity_config is of format dense; vllm 0.32.0 wants no sparsity_config"),
        (tiny_gptq, {"desc_act": True}, "desc_act is true; vllm 0.32.0 wants false, but for group_size -1"),
        (
            tiny_packed,
            {"kv_cache_scheme": CACHE | {"type": "int"}},
            "kv_cache_scheme.type is int; vllm 0.32.0 wants float",
        ),
        (
            tiny_packed,
            {"kv_cache_scheme": CACHE | {"strategy": "channel"}},
            "kv_cache_scheme.strategy is channel; vllm 0.32.0 wants tensor or attn_head",
        ),
    ],
)
def test_what_vllm_refuses_is_an_error_for_vllm_and_a_note_without_a_runtime(maker, values, message, tmp_path):
    case = maker()
    stated(case).update(values)
    assert ("error", "O651", message) in said(case, tmp_path / "vllm")
    assert ("info", "O651", message) in said(case, tmp_path / "none", "")
    assert not said(case, tmp_path / "other", "transformers", "O651")


@pytest.mark.parametrize(("maker", "key"), [(tiny_packed, "sparsity_config"), (tiny_gptq, "desc_act")])
def test_a_refused_value_that_says_nothing_of_the_tensors_is_taken_out(maker, key, tmp_path):
    case = maker()
    stated(case).update(sparse("dense") if key == "sparsity_config" else {"desc_act": True})
    recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "vllm")
    fix(case.write(tmp_path / "in"), tmp_path / "out", recipe)
    assert not Checkpoint.open(tmp_path / "out").value("config.json")["quantization_config"].get(key)


def test_a_tensor_type_that_no_config_group_can_have_is_refused_by_everybody(tmp_path):
    case = tiny_packed()
    group(case)["weights"]["group_size"] = 0
    message = "config_groups.group_0.weights.group_size is 0; must be positive for strategy group"
    assert ("error", "O651", message) in said(case, tmp_path, "")


@pytest.mark.parametrize(
    ("key", "entries", "message"),
    [
        ("targets", ["re:.*(q_proj"], "'re:.*(q_proj' is no regular expression: readers stop at it"),
        ("ignore", ["lm_head", "re:*visual*"], "'re:*visual*' is no regular expression: readers stop at it"),
        (
            "targets",
            ["re:.*experts.*"],
            f"14 modules are packed, and no target of quantization_config takes them (first {DOWN})",
        ),
    ],
)
def test_targets_that_take_nothing_and_broken_patterns_are_named(key, entries, message, tmp_path):
    case = tiny_packed()
    (group(case) if key == "targets" else stated(case))[key] = entries
    assert ("error", "O652", message) in said(case, tmp_path, "")


def test_an_embedding_is_no_linear_and_must_be_a_target_itself(tmp_path):
    case = tiny_packed()
    embedding = case.tensors.pop("model.embed_tokens.weight")
    n, k = embedding.shape
    put(case, "model.embed_tokens.weight_packed", np.arange(n * k // 8, dtype=np.int32).reshape(n, k // 8), "I32")
    put(case, "model.embed_tokens.weight_scale", np.full((n, k // 32), 0x2000, np.uint16), "F16")
    put(case, "model.embed_tokens.weight_shape", np.array([n, k], np.int64), "I64")
    message = "1 module is packed, and no target of quantization_config takes it (model.embed_tokens)"
    assert ("error", "O652", message) in said(case, tmp_path / "linear", code="O652")
    group(case)["targets"].append("Embedding")
    assert not said(case, tmp_path / "both", code="O652")


def with_cache(names):
    case = tiny_packed()
    stated(case)["kv_cache_scheme"] = CACHE
    for layer in (0, 1):
        for one in "kv":
            put(case, f"model.layers.{layer}.self_attn." + names.format(one), np.full(1, 0.02, np.float32), "F32")
    return case


@pytest.mark.parametrize("names", ["{0}_scale", "{0}_proj.{0}_scale", "attn.{0}_scale", "{0}_proj.output_scale"])
def test_cache_scales_are_known_by_every_name_that_vllm_maps(names, tmp_path):
    assert not said(with_cache(names), tmp_path / "whole", code="K502")
    case = with_cache(names)
    drop(case, "model.layers.1.self_attn." + names.format("v"))
    assert said(case, tmp_path / "cut", code="K502") == [
        (
            "warning",
            "K502",
            "1 scale of the cache is missing, though others are there (model.layers.1.self_attn.v_scale): it would be "
            "1.0",
        )
    ]


def test_a_negative_cache_scale_is_named(tmp_path):
    case = with_cache("{0}_scale")
    case.tensors["model.layers.0.self_attn.k_scale"] = np.full(1, -0.5, np.float32)
    assert ("error", "K503", "model.layers.0.self_attn.k_scale is -0.5; must be above 0") in said(case, tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1 / 2688, f"{DOWN}.weight_global_scale is 0.000372024; must be above 1"),
        (-2688.0, f"{DOWN}.weight_global_scale is -2688; must be above 1"),
    ],
)
def test_a_divisor_that_is_none_is_named(value, message, tmp_path):
    case = tiny_packed("nvfp4-pack-quantized")
    case.tensors[f"{DOWN}.weight_global_scale"] = np.full(1, value, np.float32)
    assert ("warning", "O607", message) in said(case, tmp_path)


def test_a_divisor_of_0_is_an_error(tmp_path):
    case, name = tiny_packed("nvfp4-pack-quantized"), f"{DOWN}.weight_global_scale"
    case.tensors[name] = np.zeros(1, np.float32)
    message = f"1 linear decodes to no number: its weight_global_scale, which divides its weights, is 0 ({name})"
    assert said(case, tmp_path)[0] == ("error", "O659", message)


def test_scales_that_were_never_set_are_named(tmp_path):
    case = tiny_packed()
    name = f"{DOWN}.weight_scale"
    case.tensors[name] = np.full_like(case.tensors[name], 0x3C00)
    assert ("warning", "O607", f"all 256 scales in {name} are 1") in said(case, tmp_path)


def test_wrong_bits_are_told_by_the_sizes_of_config_json_and_set_right(tmp_path):
    case = tiny_gptq()
    stated(case)["bits"] = 8
    [found] = said(case, tmp_path / "seen", "", "O612")
    assert found[2].startswith(
        "14 linears have words of 4 bits by the sizes in config.json; quantization_config says 8"
    )
    fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe)
    raw = Checkpoint.open(tmp_path / "out").value("config.json")["quantization_config"]
    assert (raw["bits"], raw["group_size"]) == (4, 32)


def test_linears_of_another_version_are_converted_and_the_rest_is_left(tmp_path):
    case = tiny_gptq()
    name = f"{DOWN}.qzeros"
    word = KNOWN["gptq_v2"].zero_word(4)
    whole = case.tensors[name].copy()
    case.tensors[name] = np.full_like(whole, np.uint32(word).view(np.int32))
    fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe)
    out = Checkpoint.open(tmp_path / "out")
    assert np.array_equal(out.load(name), whole)
    assert out.value("config.json")["quantization_config"]["checkpoint_format"] == "gptq"


def test_two_places_that_disagree_are_named_with_the_key(tmp_path):
    case = tiny_packed()
    case.config["text_config"] = {"quantization_config": stated(case) | {"format": "int-quantized"}}
    assert said(case, tmp_path, "", "O654") == [
        (
            "warning",
            "O654",
            "format is pack-quantized in config.json and int-quantized in config.json (text_config)",
        )
    ]


def test_the_version_is_set_right_in_every_place_that_states_it(tmp_path):
    case = tiny_gptq(version="gptq_v2")
    stated(case).update(checkpoint_format="gptq", format="gptq")
    case.json["quantize_config.json"] = dict(stated(case))
    fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe)
    out = Checkpoint.open(tmp_path / "out")
    for raw in (out.value("config.json")["quantization_config"], out.value("quantize_config.json")):
        assert (raw["checkpoint_format"], raw["format"]) == ("gptq_v2", "gptq_v2")


@pytest.mark.parametrize("bits", [-4, 0, 1 << 20])
def test_equal_words_of_impossible_bits_are_named_without_a_crash(bits, tmp_path):
    case = tiny_gptq()
    case.tensors[f"{DOWN}.qweight"] = np.zeros_like(case.tensors[f"{DOWN}.qweight"])
    stated(case)["bits"] = bits
    report = check(case.write(tmp_path), case.recipe)
    assert not [run for run in report.crashed if run.rule.code == "O618"]


def test_written_sizes_are_compared_with_config_json(tmp_path):
    case = tiny_packed()
    case.tensors[f"{DOWN}.weight_shape"] = np.array([128, 64], np.int64)
    message = f"1 weight_shape holds [128, 64] ({DOWN}.weight_shape); the sizes in config.json are [64, 128]"
    assert said(case, tmp_path, "", "O650") == [("error", "O650", message)]


def test_a_part_of_a_name_excludes_nothing_for_vllm(tmp_path):
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        if linear.role != "down":
            put(case, linear.tensor, rng.integers(1, 0x78, case.tensors[linear.tensor].shape, np.uint8), "F8_E4M3")
            put(case, f"{linear.tensor}_scale", np.full((1,), 0.01, np.float32), "F32")
    raw = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", "down_proj"]}
    case.config["quantization_config"] = raw
    message = f"'down_proj' excludes 2 linears (first {DOWN}) by a part of their names: vllm asks for whole names"
    assert said(case, tmp_path / "vllm", code="O623") == [("error", "O623", message)]
    assert not said(case, tmp_path / "transformers", "transformers", "O623")
    raw["modules_to_not_convert"] = ["lm_head", *(x.name for x in case.spec.linears if x.role == "down")]
    assert not said(case, tmp_path / "whole", code="O623")


def test_the_old_name_of_the_block_is_copied_to_the_new_one(tmp_path):
    case = tiny_packed()
    raw = case.config.pop("quantization_config")
    case.config["compression_config"] = raw
    fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe)
    assert Checkpoint.open(tmp_path / "out").value("config.json")["quantization_config"] == raw


def test_a_cache_scale_of_many_values_is_named(tmp_path):
    case = with_cache("{0}_scale")
    case.tensors["model.layers.0.self_attn.k_scale"] = np.full(32, 0.02, np.float32)
    message = "model.layers.0.self_attn.k_scale has 32 values; must be one for the cache of a layer"
    assert said(case, tmp_path, code="K502") == [("warning", "K502", message)]


def test_a_packed_head_of_a_tied_model_is_named(tmp_path):
    case = tiny_packed()
    head = case.tensors.pop("lm_head.weight", case.tensors["model.embed_tokens.weight"])
    case.dtypes.pop("lm_head.weight", None)
    n, k = head.shape
    put(case, "lm_head.weight_packed", np.arange(n * k // 8, dtype=np.int32).reshape(n, k // 8), "I32")
    put(case, "lm_head.weight_scale", np.full((n, k // 32), 0x2000, np.uint16), "F16")
    put(case, "lm_head.weight_shape", np.array([n, k], np.int64), "I64")
    stated(case)["ignore"] = []
    case.config["tie_word_embeddings"] = True
    message = "lm_head.weight_packed: output head is packed, but tie_word_embeddings is true"
    assert ("warning", "O613", message) in said(case, tmp_path / "tied")
    case.config["tie_word_embeddings"] = False
    assert not said(case, tmp_path / "apart", code="O613")


def plain_down(case):
    """Its first down_proj in 16 bits."""
    columns, rows = case.tensors[f"{DOWN}.qweight"].shape
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        drop(case, f"{DOWN}.{part}")
    put(case, f"{DOWN}.weight", np.full((rows, columns * 8), 0x2000, np.uint16), "F16")
    return case


@pytest.mark.parametrize("runtime, severity", [("vllm", ""), ("transformers", "error"), ("", "")])
def test_dynamic_alone_keeps_no_linear_in_16_bits_for_transformers(tmp_path, runtime, severity):
    case = plain_down(tiny_gptq())
    stated(case)["dynamic"] = {r"-:model\.layers\.0\.mlp\.down_proj$": {}}
    assert [found[0] for found in said(case, tmp_path, runtime, "O656")] == [severity] * bool(severity)


def test_without_a_runtime_plain_linears_that_no_list_names_are_a_note(tmp_path):
    assert [found[0] for found in said(plain_down(tiny_gptq()), tmp_path, "", "O656")] == ["info"]


def test_the_list_of_packed_linears_is_written_as_optimum_reads_it(tmp_path):
    case = plain_down(tiny_gptq())
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "transformers")
    fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe, only=["O656"])
    [listed] = Checkpoint.open(tmp_path / "out").value("config.json")["quantization_config"][
        "modules_in_block_to_quantize"
    ]
    named = {
        name for name in case.tensors if name.endswith(".qweight") for end in listed if name.endswith(f"{end}.qweight")
    }
    assert named == {name for name in case.tensors if name.endswith(".qweight")}
    assert not any(DOWN.endswith(end) for end in listed)


def test_a_linear_that_vllm_joins_is_excluded_by_the_joined_name(tmp_path):
    case = tiny_packed()
    plain = {f"model.layers.0.self_attn.{one}_proj" for one in "qkv"}
    for name in plain:
        n, k = case.tensors[f"{name}.weight_shape"].tolist()
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            drop(case, f"{name}.{part}")
        put(case, f"{name}.weight", np.full((n, k), 0x2000, np.uint16), "F16")
    stated(case)["ignore"] = ["lm_head", "model.layers.0.self_attn.qkv_proj"]
    assert not said(case, tmp_path / "vllm", "vllm", "O623")
    assert [found[0] for found in said(case, tmp_path / "transformers", "transformers", "O623")] == ["warning"]


def test_scales_that_are_all_negative_are_named_and_those_of_both_signs_are_not(tmp_path):
    case = tiny_gptq()
    name = f"{DOWN}.scales"
    case.tensors[name] = case.tensors[name] | np.uint16(0x8000)
    assert [found[1] for found in said(case, tmp_path / "all")] == ["O607"]
    case.tensors[name][::2] &= np.uint16(0x7FFF)  # AutoRound's symmetric grid takes the sign of the largest weight
    assert not said(case, tmp_path / "some")


def test_zero_points_of_one_word_are_symmetric_in_awq_too(tmp_path):
    case = tiny_gptq()
    for name in [n for n in case.tensors if n.endswith(".qzeros")]:
        case.tensors[name][:] = np.uint32(0x88888888).view(np.int32)
    stated(case)["checkpoint_format"] = "gptq_v2"
    assert not said(case, tmp_path, code="O657")


def test_no_fix_is_offered_where_version_1_would_wrap_a_zero_point(tmp_path):
    case = tiny_gptq()
    case.tensors[f"{DOWN}.qzeros"][0, 0] = np.uint32(0x777777F7).view(np.int32)
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O657"]
    assert found.fix is None and found.advice == "quantize again: version 1 stores some as 15, which wraps"
