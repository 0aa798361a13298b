"""Layouts of groups, planned and stored, and the geometry rules on the real sizes of published models.

The checkpoints are headers over sparse files: full size for every shape rule, a few kilobytes on disk, no values.
"""

import json
import shutil
import struct

import numpy as np
import pytest

from doctor.api import check
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.facts import Unavailable
from doctor.core.recipe import Recipe, is_kept
from doctor.core.tables import family as family_table
from doctor.edits.arithmetic import apply
from doctor.edits.kinds import PadTensor, SetJson
from doctor.formats.registry import read_quantization
from doctor.lint.testing import measured, tiny, tiny_gptq
from doctor.model.expressions import evaluate
from doctor.model.spec import build_spec
from doctor.plan.groups import LAYOUT
from doctor.plan.runtimes import in_force, runtime_entries
from doctor.scan.header import header_facts
from doctor.scan.packed_words import PackedWordStats
from doctor.scan.scan import _Words

QWEN15_14B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "num_hidden_layers": 2,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
QWEN2_7B = {
    **QWEN15_14B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
QWEN2_72B = {
    **QWEN15_14B,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN_14B = {
    **QWEN15_14B,
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "intermediate_size": 27392,
}
LLAMA3_8B = {
    **QWEN15_14B,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
PHI3_MINI = {
    **LLAMA3_8B,
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
MIXTRAL = {
    **LLAMA3_8B,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}


def headers_only(folder, config):
    """A checkpoint of a config's family whose tensors are holes in a sparse file."""
    family = config["model_type"]
    entry = family_table(family)
    header, at = {}, 0
    for item in entry["tensor"]:
        shape = [evaluate(e, build_spec(config, {}).lookup) for e in item["shape"]]
        for i in range(config["num_hidden_layers"]) if "{i}" in item["name"] else [0]:
            for e in range(config.get("num_local_experts", 0)) if "{e}" in item["name"] else [0]:
                name = item["name"].replace("{i}", str(i)).replace("{e}", str(e))
                parts = {name: shape} | (
                    {name.replace(".weight", ".bias"): shape[:1]} if item.get("bias") is True else {}
                )
                for part, size in parts.items():
                    end = at + 2 * int(np.prod(size))
                    header[part] = {"dtype": "BF16", "shape": size, "data_offsets": [at, end]}
                    at = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def geometry(folder, **recipe):
    report = check(folder, Recipe(**recipe), stage="header", select=["G"])
    assert not report.crashed
    return report.findings


def messages(findings):
    return [f"{f.code} {f.message}" for f in findings]


def test_14b_cannot_be_cut_into_8_and_pads_to_14336(tmp_path):
    (found,) = geometry(headers_only(tmp_path, QWEN15_14B), tp=8)
    assert messages([found]) == ["G302 intermediate_size 13696 = 107 × 128: 107 groups cannot be split across 8 GPUs"]
    assert found.where.note == "13696 = 107 × 128, and 107 is prime"
    assert found.facts_table == (
        ("tensor parallel", "1", "2", "4", "8"),
        ("groups per GPU", "107", "53.5", "26.75", "13.38"),
        ("next size that fits", "13696", "13824", "13824", "14336"),
    )
    config = [e for e in found.fix.edits if isinstance(e, SetJson)]
    assert config == [SetJson("config.json", "/intermediate_size", 14336, expect=13696)]
    pads = {(e.tensor.split(".mlp.")[1], e.axis, e.size) for e in found.fix.edits if isinstance(e, PadTensor)}
    assert pads == {
        ("gate_proj.weight", 0, 14336),
        ("up_proj.weight", 0, 14336),
        ("down_proj.weight", 1, 14336),
    }
    assert found.fix.safety == "unsafe" and "W201" in found.fix.needs


@pytest.mark.parametrize(
    "config, tp, size",
    [
        (QWEN15_14B, 2, 13824),
        (QWEN15_14B, 4, 13824),
        (QWEN2_72B, 2, 29696),
        (QWEN2_72B, 4, 29696),
        (QWEN2_72B, 8, 29696),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else x["intermediate_size"],
)
def test_padded_sizes_are_those_that_qwen_publishes(tmp_path, config, tp, size):
    (found,) = geometry(headers_only(tmp_path, config), tp=tp)
    assert found.code == "G302" and found.fix.edits[-1].value == size


def test_qwen_1_states_twice_its_width_and_so_does_the_fix(tmp_path):
    (found,) = geometry(headers_only(tmp_path, QWEN_14B), tp=2)
    assert found.fix.edits[-1].value == 2 * 13824
    assert {e.size for e in found.fix.edits[:-1]} == {13824}


@pytest.mark.parametrize(
    "config, recipe",
    [
        (QWEN15_14B, {}),
        (QWEN15_14B, {"group_size": 64, "tp": 2}),
        (QWEN2_7B, {"tp": 4}),
        (QWEN2_72B, {}),
        (LLAMA3_8B, {"tp": 8}),
        (LLAMA3_8B, {"tp": 8, "runtime": "vllm"}),
        (LLAMA3_8B, {"tp": 8, "runtime": "sglang"}),
        (PHI3_MINI, {"tp": 8}),
        (MIXTRAL, {"tp": 8}),
        (MIXTRAL, {"tp": 4, "runtime": "vllm", "runtime_version": "0.9.0"}),
        (QWEN_14B, {}),
        (QWEN2_7B, {"runtime": "vllm", "tp": 4}),
        (LLAMA3_8B, {"runtime": "exllamav2"}),
        (LLAMA3_8B, {"method": "awq", "sym": False, "runtime": "vllm"}),
        (LLAMA3_8B, {"format": "compressed-tensors", "runtime": "vllm"}),
        (LLAMA3_8B, {"runtime": "llama.cpp"}),
        (LLAMA3_8B, {"runtime": "transformers", "bits": 3}),
    ],
    ids=lambda x: x["model_type"] if "model_type" in x else " ".join(f"{k}={v}" for k, v in x.items()) or "plain",
)
def test_published_models_have_no_geometry_findings_where_they_are_known_to_serve(tmp_path, config, recipe):
    assert messages(geometry(headers_only(tmp_path, config), **recipe)) == []


def test_28_heads_do_not_fit_8_gpus_but_their_groups_are_named_too(tmp_path):
    assert [f.code for f in geometry(headers_only(tmp_path, QWEN2_7B), tp=8)] == ["G302", "G304"]


def test_old_vllm_refuses_what_new_vllm_pads(tmp_path):
    folder = headers_only(
        tmp_path, {**LLAMA3_8B, "intermediate_size": 14784, "num_hidden_layers": 1}
    )  # 231 groups of 64
    old = geometry(folder, group_size=64, runtime="vllm", runtime_version="0.9.2")
    assert (
        [f.code for f in old] == ["G303"]
        and "down: 14784 in_features" in old[0].message
        and old[0].severity == "warning"
    )
    assert geometry(folder, group_size=64, runtime="vllm") == []


def test_awq_without_a_group_that_divides_is_one_finding_per_width(tmp_path):
    found = geometry(headers_only(tmp_path, {**LLAMA3_8B, "hidden_size": 4160, "head_dim": 128}), method="awq")
    assert messages(found) == [
        "G301 in_features 4160 of q, k, v, gate and up (10 linears) = 32.5 × 128: group size 128 does not divide it"
    ]
    assert found[0].fix.edits[0].value == 64


# padding


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe"])
def test_padding_leaves_the_mlp_exact_and_no_group_empty(family, tmp_path):
    case = tiny(family)
    case.recipe = Recipe(group_size=32, tp=4)
    _narrow(case, family)
    found = [f for f in check(case.write(tmp_path), case.recipe, stage="header", select=["G302"]).findings if f.fix]
    assert found
    infos = case.infos()
    for edit in [e for f in found for e in f.fix.edits if isinstance(e, PadTensor)]:
        before = case.tensors[edit.tensor]
        after = apply(before, infos[edit.tensor], [edit])
        assert after.shape[edit.axis] == edit.size > before.shape[edit.axis]
        if before.ndim == 2 and edit.axis == 1:
            groups = from_codes(after, "BF16").reshape(len(after), -1, 32)
            assert (np.abs(groups).max(2) > 0).all(), "a group of zeros"
        kept = [i for i in range(after.shape[edit.axis]) if np.take(after, i, edit.axis).any()]
        assert len(kept) == before.shape[edit.axis]


def _narrow(case, family):
    """Make the MLP 96 wide: three groups, which no two GPUs can share. Experts too."""
    keys = [
        k
        for k in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim")
        if k in case.config
    ]
    for key in keys:
        case.config[key] = 96
    rng = np.random.default_rng(3)
    spec = build_spec(case.config, case.infos())
    for name, codes in list(case.tensors.items()):
        weight = name.replace(".bias", ".weight")
        shape = spec.expected_shape(weight)
        if shape is not None:
            wanted = shape[: codes.ndim]
            if tuple(wanted) != codes.shape:
                case.tensors[name] = rng.integers(0x3C00, 0x3D00, wanted, np.uint16)


def test_fused_gate_and_up_are_padded_in_each_half(tmp_path):
    case = tiny("phi3")
    _narrow(case, "phi3")
    (found,) = [
        f for f in check(case.write(tmp_path), Recipe(group_size=32, tp=2), stage="header", select=["G302"]).findings
    ]
    edit = next(e for e in found.fix.edits if isinstance(e, PadTensor) and "gate_up" in e.tensor)
    assert (edit.blocks, edit.size) == (2, 256)


# stored layouts


def facts_of(case, folder):
    return header_facts(Checkpoint.open(case.write(folder)), case.recipe)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe"])
def test_stored_layout_has_the_sizes_of_the_plain_one(family, tmp_path):
    plain = facts_of(tiny(family), tmp_path / "plain").get(LAYOUT)
    packed = facts_of(tiny_gptq(family), tmp_path / "packed").get(LAYOUT)
    assert packed.quantized and not plain.quantized
    assert sorted(map(repr, packed.linears)) == sorted(map(repr, plain.linears))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe"])
def test_packed_checkpoint_of_every_family_is_healthy(family, tmp_path):
    case = tiny_gptq(family)
    report = check(case.write(tmp_path), case.recipe)
    assert not report.crashed and messages(report.findings) == []


def test_stored_awq_and_compressed_tensors_sizes():
    awq = read_quantization(
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        "f",
        "",
    )
    assert (awq.bits, awq.group_size, awq.sym, awq.version) == (4, 64, False, "gemm")
    weights = {"num_bits": 4, "group_size": 128, "symmetric": True, "strategy": "group"}
    raw = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    packed = read_quantization(raw, "config.json", "/quantization_config")
    assert (packed.format.name, packed.bits, packed.group_size, packed.sym) == ("compressed-tensors", 4, 128, True)


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes"},
        {},
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "compressed-tensors", "config_groups": []},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {"+:.*down.*": {"bits": 8, "group_size": 32}},
        },
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:*down": {"bits": 8}}},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*down.*": 8}},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": ["+:.*down.*"]},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv_fast"},
    ],
)
def test_other_quantizations_are_unavailable_with_a_reason(raw):
    with pytest.raises(Unavailable):
        read_quantization(raw, "config.json", "")


def test_a_linear_has_the_width_that_its_name_is_given():
    common = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    found = read_quantization(
        {
            **common,
            "dynamic": {r"-:^a\.kept$": {}, r"+:^a\.b$": {"bits": 8}, r".*\.1\.": {"bits": 2, "group_size": 128}},
        },
        "f",
        "",
    )
    assert [found.bits_of(n) for n in ("a.b", "a.bc", "a.kept", "x.1.y", "x.11.y")] == [8, 4, 4, 2, 4]
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group"}
    groups = {
        "some": {"targets": ["a.b", "re:.*down"], "weights": {**weights, "num_bits": 8}},
        "rest": {"targets": ["Linear"], "weights": weights},
    }
    found = read_quantization(
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}, "f", ""
    )
    assert (found.bits, [found.bits_of(n) for n in ("a.b", "a.b.c", "x.down_proj", "x.up")]) == (4, [8, 4, 8, 4])
    for odd in (5, None, [7]):  # no target is named, and nothing crashes
        stated = {"some": {**groups["some"], "targets": odd}, "rest": groups["rest"]}
        assert (
            read_quantization(
                {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": stated}, "f", ""
            ).bits_of("a.b")
            == 4
        )
    assert read_quantization({**common, "dynamic": {"-:.*": None, "+:.*a": {"bits": 8.0}}}, "f", "").bits_of("a") == 4
    groups["some"]["weights"]["group_size"] = 64
    with pytest.raises(Unavailable, match="more than their width"):
        read_quantization(
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}, "f", ""
        )


def test_quantized_checkpoint_is_judged_for_the_gpus_it_is_to_be_cut_into(tmp_path):
    case = tiny_gptq("llama")
    report = check(case.write(tmp_path), Recipe(group_size=128, tp=8), stage="header", select=["G302"])
    assert messages(report.findings) == ["G302 intermediate_size 128 = 4 × 32: 4 groups cannot be split across 8 GPUs"]
    assert report.findings[0].fix is None  # packed words cannot be padded in place


# words


def test_words_are_the_same_however_the_bytes_are_cut():
    rng = np.random.default_rng(1)
    words = np.sort(rng.integers(-5, 9, 4096, dtype=np.int32))
    data = words.tobytes()
    whole, parts = _Words(), _Words()
    whole.add(memoryview(data))
    for i in range(0, len(data), 40):
        parts.add(memoryview(data)[i : i + 40])
    assert whole.result() == parts.result()
    assert whole.result().rising and (whole.smallest, whole.largest) == (-5, 8)


def test_words_know_a_field_of_15_and_a_fall_between_chunks():
    words = _Words()
    words.add(memoryview(np.array([0x77777777, 0x777F7777], np.uint32).tobytes()))
    words.add(memoryview(np.array([3], np.uint32).tobytes()))
    result = words.result()
    assert result == PackedWordStats(3, 3, 0x777F7777, False, 1, {0x77777777: 1, 0x777F7777: 1, 3: 1})


def test_more_than_sixteen_kinds_of_words_are_not_counted():
    words = _Words()
    words.add(memoryview(np.arange(17, dtype=np.int32).tobytes()))
    assert words.result().kinds is None


# small things


def test_rows_of_a_kernel_table_hold_for_their_versions():
    assert in_force({"until": "0.24.0"}, "0.9.2") and not in_force({"until": "0.24.0"}, "0.24.0")
    assert in_force({"since": "0.24.0"}, "") and not in_force({"until": "0.24.0"}, "")
    assert in_force({"since": "0.6.0", "until": "0.24.0"}, "0.10.1.post1+cu128")


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "exllamav2", "transformers"])
def test_every_runtime_has_rows_for_its_newest_version(runtime):
    assert runtime_entries(Recipe(runtime=runtime))


def test_kept_linears_are_named_by_pattern_or_part():
    recipe = Recipe(keep=("*.layers.0.*", "down_proj"))
    assert is_kept(recipe, "model.layers.0.mlp.up_proj") and is_kept(recipe, "model.layers.3.mlp.down_proj")
    assert not is_kept(recipe, "model.layers.3.mlp.up_proj")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "opt", "qwen2_moe"])
def test_sound_calibration_of_every_family_gives_no_finding(family, tmp_path):
    case = measured(family)
    report = check(case.write(tmp_path), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()])
    assert not report.crashed and messages(report.findings) == []


def test_where_no_width_fills_the_tiles_the_search_ends(tmp_path):
    """64 in_features are no multiple of 128, whatever the MLP's width; Marlin wants both."""
    case = tiny("llama", mlp=576)
    case.recipe = Recipe(group_size=64, runtime="sglang", tp=8)
    tried = []
    from doctor.rules import g303_kernel_shape as rule_file

    def counting(*args, grown=rule_file.grown):
        *rest, suits, period = args
        return grown(*rest, lambda width: tried.append(width) or suits(width), period)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rule_file, "grown", counting)
        found = [f for f in check(case.write(tmp_path), case.recipe, stage="header").findings if f.code == "G303"]
    assert found and all(f.fix is None for f in found) and 0 < len(tried) < 3000


def test_further_groups_of_compressed_tensors_leave_the_plan_of_the_rest(tmp_path):
    from doctor.formats.registry import format_of
    from doctor.model.quantization_config import stored_recipe

    case = tiny("llama")
    recipe = Recipe(group_size=32, format="compressed-tensors")
    case.config["quantization_config"] = format_of(recipe).config(recipe, widths={"model.layers.0.mlp.down_proj": 8})
    assert len(case.config["quantization_config"]["config_groups"]) == 2
    found = stored_recipe(Checkpoint.open(case.write(tmp_path)), Recipe())
    assert (found.label(), found.sym) == ("compressed-tensors 4-bit g32", True)


def autoround(packing, version="gptq"):
    """The same packed words under the block that AutoRound writes."""
    case = tiny_gptq("llama", version=version)
    case.files.pop("quantize_config.json", None)
    plain = case.config["quantization_config"]
    case.config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "iters": 200,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
    }
    return case, plain


@pytest.mark.parametrize(
    "packing, version",
    [("auto_round:auto_gptq", "gptq"), ("auto_round:gptqmodel", "gptq_v2"), ("auto_round", "gptq_v2")],
)
def test_an_autoround_block_is_read_as_the_form_that_it_packs_in(packing, version, tmp_path):
    from doctor.quant.dequantize import as_float

    case, plain = autoround(packing, version)
    report = check(case.write(tmp_path / "m"))
    assert (
        not report.findings
        and report.recipe.label() == f"{version} 4-bit g32"
        and next(r for r in report.runs if r.rule.code == "O608").judged
    )
    case.config["quantization_config"] = plain
    ours, same = as_float(Checkpoint.open(tmp_path / "m")), as_float(Checkpoint.open(case.write(tmp_path / "n")))
    name = "model.layers.0.mlp.down_proj.weight"
    assert (ours.load(name) == same.load(name)).all() and np.isfinite(ours.load(name)).all()


def test_a_width_of_its_own_in_autorounds_words_is_read(tmp_path):
    case, _ = autoround("auto_round:auto_gptq", "gptq")
    name = "model.layers.1.mlp.down_proj"
    case.config["quantization_config"]["extra_config"] = {
        name: {"bits": 8, "group_size": 32},
        "lm_head": {"bits": 16, "data_type": "float"},
    }
    found = check(case.write(tmp_path), select=["O612"]).findings  # its words are of 4 bits
    assert (
        [f.code for f in found] == ["O612"]
        and found[0].message.startswith("1 linear has words of 4 bits")
        and "says 8" in found[0].message
    )


def test_the_wrong_packing_format_is_found_and_set_in_autorounds_own_words(tmp_path):
    from doctor.api import fix

    case, _ = autoround("auto_round:auto_gptq", "gptq_v2")
    result = fix(case.write(tmp_path / "m"), tmp_path / "o")
    assert [f.code for f in result.report_before.findings] == ["O608"] and not result.report.findings
    assert (
        Checkpoint.open(tmp_path / "o").value("config.json")["quantization_config"]["packing_format"]
        == "auto_round:gptqmodel"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"packing_format": "auto_round:llm_compressor"},
        {"packing_format": ["auto_round"]},
        {"data_type": "mx_fp"},
        {"extra_config": {"lm_head": {"bits": 8, "sym": False}}},
        {"extra_config": {"lm_head": {"bits": 8, "data_type": "mx_fp"}}},
    ],
)
def test_other_autoround_blocks_are_not_judged_and_that_is_said(change, tmp_path):
    case, _ = autoround("auto_round:auto_gptq")
    from doctor.core.errors import BadCheckpoint
    from doctor.quant.dequantize import as_float

    case.config["quantization_config"] |= change
    report = check(case.write(tmp_path))
    assert not report.crashed, [r.crashed for r in report.crashed]
    with pytest.raises(BadCheckpoint, match="cannot be read back"):
        as_float(Checkpoint.open(tmp_path))
    run = next(r for r in report.runs if r.rule.code == "O608")
    assert not report.findings and run.status == "skipped" and run.reasons


@pytest.fixture(scope="module", params=["gptq", "compressed-tensors"])
def mixed(request, tmp_path_factory):
    """A checkpoint of 4 bits but for one linear of 8, and the one that it was made of."""
    from doctor.api import quantize

    folder = tmp_path_factory.mktemp("mixed")
    source = tiny("llama").write(folder / "m")
    recipe = Recipe(method="rtn", group_size=32, format=request.param, bits_for=("*.1.*down*=8",))
    return quantize(source, folder / "q", recipe).output, source


def changed(folder, target, change):
    """A copy of a checkpoint with `change` made to its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_weights_are_counted_where_widths_differ(mixed):
    made, source = mixed
    assert check(made).summary["parameters"] == check(source).summary["parameters"] > 0


def test_a_linear_of_its_own_width_is_judged_by_that(mixed, tmp_path):
    made, _ = mixed
    name = "model.layers.1.mlp.down_proj"
    report = check(made, select=["O"])
    assert not report.findings
    assert {r.rule.code for r in report.runs if r.status != "skipped"} >= {"O607", "O608", "O612", "O614"}
    scales = f"{name}.scales" if (gptq := "gptq" in (made / "config.json").read_text()) else f"{name}.weight_scale"

    def halve(tensors):
        tensors[scales] = (tensors[scales][:1] if gptq else tensors[scales][:, :1]).clone()

    found = check(changed(made, tmp_path / "halved", halve), select=["O612"]).findings
    assert (
        [f.code for f in found] == ["O612"]
        and f"{name} has scales" in found[0].message
        and "8 bits in groups of 32" in found[0].message
    )
    if gptq:

        def shift(tensors):
            tensors[f"{name}.qzeros"].fill_(0x80808080 - (1 << 32))

        found = check(changed(made, tmp_path / "shifted", shift), select=["O608"]).findings
        assert [f.evidence["first"] for f in found] == [f"{name}.qzeros"] and "0x80808080" in found[0].message


def test_every_linear_is_unpacked_by_its_own_width(mixed, tmp_path):
    from doctor.api import fix

    made, source = mixed
    fix(made, tmp_path / "plain", only=("C147",), unsafe_fixes=("C147",), extend_select=("C147",))
    plain, whole = (Checkpoint.open(f) for f in (tmp_path / "plain", source))
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        got, want = (from_codes(c.load(name), c.tensors[name].dtype.name) for c in (plain, whole))
        assert got.shape == want.shape and np.abs(got - want).max() < np.abs(want).max() * (
            0.01 if ".1." in name else 0.2
        )
