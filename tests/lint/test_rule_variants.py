"""What rules say beyond the one sentence of their example: other causes, other severities, and the edges of their
thresholds.
"""

import math
import re
from dataclasses import replace

import pytest

from doctor.api import check
from doctor.fixing.plan import with_fields
from doctor.lint.testing import change, compared, encode, measured, tiny, tiny_gptq

NAN = float("nan")
DOWN = "model.layers.0.mlp.down_proj"


def said(case, folder, code):
    report = check(case.write(folder), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()])
    assert not report.crashed, [r.crashed for r in report.crashed]
    return [(f.severity, f.message) for f in report.findings if f.code == code]


HESSIAN = [
    ("Q401", {"finite": False}, ("error", f"the inputs of {DOWN} are finite, but their products overflow")),
    ("Q403", {"n_dead": 128}, ("warning", f"every input of {DOWN} was 0 in 4,096 calibration tokens")),
    ("Q403", {"n_dead": 1}, None),  # under a percent
    ("Q404", {"tokens": 128}, None),  # as many tokens as in_features are enough to have full rank
    ("Q404", {"tokens": 127}, ("warning", f"{DOWN} saw 127 calibration tokens for 128 in_features")),
    ("Q411", {"damp_needed": 0.01}, None),
    ("Q411", {"damp_needed": 0.7}, ("warning", f"{DOWN} needs damp 0.7 in float32; 0.049 is added first")),
]


@pytest.mark.parametrize("code, values, expected", HESSIAN)
def test_hessian_rules_at_their_edges(code, values, expected, tmp_path):
    case = measured("llama")
    change(case, f"linear:{DOWN}", "hessian", **values)
    assert said(case, tmp_path, code) == ([expected] if expected else [])


SOLVE = [
    (
        "Q402",
        {"precision": "eigen"},
        (
            "warning",
            f"negative eigenvalues of the Hessian of {DOWN} raised to 0.01 of its mean after 1 attempt",
        ),
    ),
    ("Q402", {"precision": "float64"}, None),  # more digits are no less quality
    ("Q405", {"loss": NAN}, ("warning", f"{DOWN}: gptq lost nan of the output's energy, rounding 0.01")),
    ("Q405", {"loss": 0.01005}, None),
    ("Q405", {"outcome": "rtn", "loss": 0.01}, None),  # Q406 speaks
    (
        "Q406",
        {"outcome": "kept", "note": "in_features 100 is not a multiple of group_size 32"},
        (
            "warning",
            f"{DOWN} stays in 16 bits instead of gptq: in_features 100 is not a multiple of group_size 32",
        ),
    ),
]


@pytest.mark.parametrize("code, values, expected", SOLVE)
def test_solve_rules_at_their_edges(code, values, expected, tmp_path):
    case = measured("llama")
    change(case, f"linear:{DOWN}", "solve", **values)
    assert said(case, tmp_path, code) == ([expected] if expected else [])


def test_linears_that_the_user_keeps_are_no_fallback(tmp_path):
    case = measured("llama")
    case.recipe = case.recipe.with_field("keep", ("down_proj",))
    change(case, f"linear:{DOWN}", "solve", outcome="kept", note="asked for with keep")
    assert said(case, tmp_path, "Q406") == []


def test_rounding_by_choice_is_no_fallback(tmp_path):
    case = measured("llama")
    case.recipe = case.recipe.with_field("method", "rtn")
    change(case, f"linear:{DOWN}", "solve", outcome="rtn")
    assert said(case, tmp_path, "Q406") == []


COMPARISON = [
    ("O601", {"perplexity_quantized": NAN}, "error"),
    ("O601", {"perplexity_quantized": math.inf}, "error"),
    ("O601", {"perplexity_quantized": 18.0}, "warning"),
    ("O601", {"perplexity_quantized": 15.0}, None),
    ("O603", {"token0_share": 0.5}, None),
    ("O604", {"kl_mean": NAN}, "warning"),
    ("O604", {"top1_agreement": NAN}, "warning"),
    ("O605", {"longest_repeat": 11}, None),
    ("O606", {"perplexity_original": NAN}, "error"),
    ("O616", {"one_choice": 0.5}, None),
    ("O616", {"one_choice": 0.9, "one_choice_original": 0.46}, None),
    ("O616", {"one_choice": 0.9, "one_choice_original": 0.44}, "error"),
    ("O616", {"entropy_quantized": 4.56}, "error"),
    ("O616", {"entropy_quantized": 4.3}, None),
    ("O616", {"entropy_quantized": 4.56, "entropy_original": 3.7}, None),
    ("O606", {"perplexity_original": 97.0}, "error"),
]


@pytest.mark.parametrize("code, values, severity", COMPARISON)
def test_comparison_rules_fail_on_nan_and_keep_to_their_thresholds(code, values, severity, tmp_path):
    case = compared()
    change(case, "checkpoint:", "comparison", **values)
    assert [s for s, _ in said(case, tmp_path, code)] == ([severity] if severity else [])


def test_key_bias_thresholds_and_the_norm_that_lifts_them(tmp_path):
    name = "model.layers.0.self_attn.k_proj.bias"
    for value, found in ((29.0, 0), (31.0, 1), (214.0, 1)):
        case = tiny("qwen2")
        case.tensors[name][5] = encode([value], "BF16")[0]
        assert len(said(case, tmp_path / str(value), "K501")) == found
    case.tensors["model.layers.0.self_attn.k_norm.weight"] = encode([1.0] * 16, "BF16")
    case.dtypes["model.layers.0.self_attn.k_norm.weight"] = "BF16"
    assert said(case, tmp_path / "norm", "K501") == []


def test_zero_rows_are_padding_and_no_zero_groups(tmp_path):
    case = tiny("llama")
    case.tensors["model.layers.0.mlp.gate_proj.weight"][::4] = 0
    case.tensors["model.layers.0.mlp.up_proj.weight"][::4] = 0
    assert said(case, tmp_path, "W203") == [] and said(case, tmp_path, "W204") == []


def test_biases_masks_and_offset_norms_of_zero_are_sound(tmp_path):
    case = tiny("gemma")
    for name, codes in case.tensors.items():
        if "norm" in name:
            codes[:] = 0
    assert [said(case, tmp_path, code) for code in ("W202", "W207", "W208")] == [[], [], []]


def test_mask_of_minus_a_billion_is_no_weight(tmp_path):
    case = tiny("llama")
    (
        case.tensors["model.layers.0.self_attn.masked_bias"],
        case.dtypes["model.layers.0.self_attn.masked_bias"],
    ) = encode([-1e9], "F32"), "F32"
    assert said(case, tmp_path, "W205") == []


def test_part_of_a_fused_set_in_16_bits_is_an_error_only_where_engines_fuse(tmp_path):
    case = tiny_gptq("llama")
    name = "model.layers.1.self_attn.k_proj"
    for tail in ("qweight", "qzeros", "scales", "g_idx"):
        del case.tensors[f"{name}.{tail}"]
    case.tensors[f"{name}.weight"], case.dtypes[f"{name}.weight"] = (
        encode([[0.1] * 63 + [0.2]] * 32, "BF16"),
        "BF16",
    )
    message = "model.layers.1.self_attn: q and v in 4 bits and k in 16 bits, but engines fuse them into one matrix"
    assert said(case, tmp_path / "any", "G307") == [("warning", message)]
    case.recipe = case.recipe.with_field("runtime", "vllm")
    assert said(case, tmp_path / "vllm", "G307") == [("error", message)]


@pytest.mark.parametrize("runtime, fixed", [("", True), ("transformers", True), ("vllm", False)])
def test_a_scattered_group_index_is_stated_only_where_the_runtime_reads_it(tmp_path, runtime, fixed):
    case = tiny_gptq("llama")
    case.tensors[f"{DOWN}.g_idx"] = case.tensors[f"{DOWN}.g_idx"][::-1].copy()
    case.recipe = case.recipe.with_field("runtime", runtime)
    [found] = [f for f in check(case.write(tmp_path / "in"), case.recipe).findings if f.code == "O610"]
    assert (found.fix is not None) == fixed


def test_group_index_beyond_the_scales_is_named(tmp_path):
    case = tiny_gptq("llama")
    case.tensors[f"{DOWN}.g_idx"][-1] = 9
    assert said(case, tmp_path, "O610") == [("error", f"{DOWN}.g_idx has entries from 0 to 9; there are 4 groups")]


def test_group_size_that_the_scales_contradict_is_named(tmp_path):
    case = tiny_gptq("llama")
    case.config["quantization_config"]["group_size"] = 64
    found = said(case, tmp_path, "O612")
    assert len(found) == 14 and found[0] == (
        "error",
        f"{DOWN} has scales [4, 64]; 4 bits in groups of 64 need [2, 64]",
    )


def test_huge_scales_are_named(tmp_path):
    case = tiny_gptq("llama")
    case.tensors[f"{DOWN}.scales"][0, 0] = encode([5000.0], "F16")[0]
    assert said(case, tmp_path, "O607") == [("warning", f"{DOWN}.scales has a scale of 5,000")]


def test_a_packed_router_is_named(tmp_path):
    case = tiny_gptq("qwen2_moe")
    for tail in ("qweight", "qzeros", "scales", "g_idx"):
        source = f"model.layers.0.mlp.experts.0.gate_proj.{tail}"
        case.tensors[f"model.layers.0.mlp.gate.{tail}"], case.dtypes[f"model.layers.0.mlp.gate.{tail}"] = (
            case.tensors[source],
            case.dtypes[source],
        )
    del case.tensors["model.layers.0.mlp.gate.weight"]
    assert said(case, tmp_path, "O613") == [("warning", "model.layers.0.mlp.gate.qweight: router is packed")]


def test_an_absent_bos_that_its_class_and_its_tokenizer_give_alike_is_a_note(tmp_path):
    """Gemma 3 is published so. Where the tokenizer's files do not state it, config.json alone could tell: a warning."""
    case = tiny("llama")
    del case.config["bos_token_id"]
    message = "bos_token_id is absent in config.json; tokenizer_config.json has <s> = 1"
    assert said(case, tmp_path / "both", "C101") == [("info", message)]
    del case.json["tokenizer_config.json"]["bos_token"]
    message = "bos_token_id is absent in config.json; generation_config.json has <s> = 1"
    assert said(case, tmp_path / "class", "C101") == [("warning", message)]


@pytest.mark.parametrize(
    "runtime, version, reported",
    [
        ("vllm", "0.3.3", True),
        ("vllm", "0.4.2", False),
        ("exllamav2", "0.1.4", True),
        ("exllamav2", "0.1.5", False),
        ("exllamav2", "", False),
    ],
)
def test_only_the_versions_that_users_named_are_reported(runtime, version, reported, tmp_path):
    case = tiny("qwen2", dtype="F16")
    case.config["torch_dtype"] = "float16"
    case.recipe = case.recipe.with_field("runtime", runtime).with_field("runtime_version", version)
    assert bool(said(case, tmp_path, "G317")) is reported


def test_the_table_of_what_was_published_holds_nothing_made_up():
    """Examples bring rows of their own (the fact given_published), so that none stands among those that users are
    judged by.
    """
    from doctor.core.tables import table

    known = table("published")
    assert all(
        re.search(r"\w+/\w+ (issue|pull)", row["source"]) and "doctor" not in row["source"] for row in known["reports"]
    )
    assert all(
        len(row) > 3 and row[0] >= 512 and row[2] >= 32000 and row[3:] == sorted(set(row[3:])) for row in known["width"]
    )


@pytest.mark.parametrize("width, cut", [(29440, True), (29568, False), (29696, False), (24576, False), (27000, False)])
def test_a_width_just_below_a_published_one_is_a_cut_and_padding_is_not(width, cut, tmp_path):
    """Qwen3-VL issue 231: 29568 cut to 29440 = 230 x 128."""
    from doctor.rules.f060_cut_width import cut_width

    from doctor.core.tables import table
    from doctor.model.linears import Linear
    from doctor.model.spec import build_spec

    spec = build_spec(
        {
            "model_type": "qwen2",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "vocab_size": 152064,
            "intermediate_size": width,
        },
        {},
    )
    spec.linears = (
        Linear("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", "down", 0, width, 8192),
    )
    assert [f.evidence["published"] for f in cut_width(None, spec, table("published"), {}, None)] == (
        [29568] if cut else []
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_a_known_family_without_any_of_its_layers_is_not_passed(family, tmp_path):
    case = tiny(family)
    for name in [n for n in case.tensors if any(part.isdigit() for part in n.split("."))]:
        del case.tensors[name]
    report = check(case.write(tmp_path), case.recipe)
    assert [(f.code, f.severity) for f in report.findings] == [("C142", "error")]
    assert "the files hold 0 decoder layers" in report.findings[0].message and report.findings[0].fix.safety == "manual"


def test_a_config_that_counts_layers_without_end_is_answered_at_once(tmp_path):
    case = tiny("llama")
    case.config["num_hidden_layers"] = 1 << 39
    assert said(case, tmp_path, "C142") == [
        (
            "error",
            "num_hidden_layers is 549755813888 in config.json; the files hold 2 decoder layers: "
            "model.layers.{2-9999} is in no file",
        )
    ]


@pytest.mark.parametrize(
    "runtime, dynamic, says",
    [
        ("transformers", {"+:^model\\.layers\\.0\\..*$": {"bits": 8}}, True),
        ("exllamav2", {"model.layers.0": {"bits": 8}}, True),
        ("vllm", {"+:^model\\.layers\\.0\\..*$": {"bits": 8}}, False),
        ("transformers", {"-:^lm_head$": {}}, False),
        ("transformers", None, False),
        ("transformers", {"+:x": {"desc_act": True}}, False),
        ("transformers", ["+:x"], False),
    ],
)
def test_stored_widths_that_a_runtime_does_not_read_are_named(runtime, dynamic, says, tmp_path):
    case = tiny_gptq("llama")
    case.config["quantization_config"]["dynamic"] = dynamic
    case.recipe = case.recipe.with_field("runtime", runtime)
    found = said(case, tmp_path, "G318")
    assert bool(found) is says and (
        not says or (found[0][0] == "error" and runtime in found[0][1] and next(iter(dynamic)) in found[0][1])
    )


QK = (
    "vllm puts the rows of q and k in the wrong order (first model.layers.0.self_attn.k_proj, 4 in all): for its "
    "rotary embedding it reorders"
)
NVFP4 = {"method": "rtn", "format": "nvfp4-pack-quantized", "group_size": 16}
INT8 = {"method": "rtn", "bits": 8, "group_size": -1, "format": "int-quantized", "activations": "int8"}
UNLOADED = "transformers refuses to load packed experts of this kind"
WRONG = "transformers loads packed experts of this kind with wrong values and no error"
RANDOM = "transformers leaves the linears of experts out when from_pretrained loads them, and computes with random ones"


@pytest.mark.parametrize(
    "family, changes, expected",
    [
        ("llama4_text", {}, ("warning", QK)),
        ("llama4_text", {"runtime": "vllm"}, ("error", QK)),
        ("llama4_text", {"runtime": "vllm", "format": "gptq_v2"}, ("error", QK)),
        ("llama4_text", {"runtime": "vllm", "format": "awq"}, ("error", QK)),
        ("llama4_text", {"runtime": "vllm", "format": "compressed-tensors", "sym": False}, ("error", QK)),
        ("llama4_text", {"runtime": "vllm", "format": "compressed-tensors"}, None),
        ("llama4_text", {"runtime": "vllm", "keep": ("q_proj", "k_proj", "v_proj")}, None),
        ("llama4_text", {"runtime": "sglang"}, None),
        ("llama", {"runtime": "vllm"}, None),
        ("mixtral", {}, None),
        ("mixtral", {"runtime": "vllm"}, None),
        ("mixtral", {"runtime": "transformers"}, ("warning", RANDOM)),
        ("mixtral", {"runtime": "transformers", "runtime_version": "4.57.0"}, None),
        ("mixtral", {"runtime": "transformers", "format": "compressed-tensors"}, None),
        ("gpt_oss", {"runtime": "transformers"}, ("warning", RANDOM)),
        ("mixtral", {"format": "compressed-tensors", "sym": False}, ("warning", UNLOADED)),
        ("mixtral", {"runtime": "transformers", "format": "compressed-tensors", "sym": False}, ("error", UNLOADED)),
        ("mixtral", {"runtime": "vllm", "format": "compressed-tensors", "sym": False}, None),
        ("mixtral", {**NVFP4, "runtime": "transformers"}, ("error", WRONG)),
        ("mixtral", {**NVFP4, "keep": ("experts",)}, None),
        ("llama", NVFP4, None),
        ("qwen3_moe", INT8, ("warning", UNLOADED)),
        ("qwen3_moe", {**INT8, "format": "float-quantized", "activations": "fp8"}, None),
        (
            "qwen3_moe",
            {**INT8, "format": "float-quantized", "group_size": 128, "activations": "fp8-block"},
            ("warning", UNLOADED),
        ),
    ],
)
def test_what_a_runtime_misreads_is_said_of_what_it_reads(family, changes, expected, tmp_path):
    case = tiny(family)
    case.recipe = replace(case.recipe, **changes)
    found = said(case, tmp_path, "G319")
    assert [severity for severity, _ in found] == ([expected[0]] if expected else []) and all(
        text.startswith(expected[1]) for _, text in found
    )


@pytest.mark.parametrize(
    "changes, fix",
    [
        ({}, "write compressed-tensors"),
        ({"format": "awq"}, "write compressed-tensors"),
        ({"format": "compressed-tensors", "sym": False}, "keep q, k and v in 16 bits"),
    ],
)
def test_a_misread_plan_is_cured_by_another_format_or_by_16_bits(changes, fix, tmp_path):
    case = tiny("llama4_text")
    case.recipe = replace(case.recipe, runtime="vllm", **changes)
    report = check(case.write(tmp_path), case.recipe)
    item = next(f for f in report.findings if f.code == "G319")
    assert item.fix.title == fix
    recipe = with_fields(case.recipe, item.fix.edits)
    assert not [f for f in check(tmp_path, recipe).findings if f.code == "G319"]
