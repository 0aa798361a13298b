"""Stored formats, judged as engines read them: what is named, and what stays silent."""

import numpy as np
import pytest

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.formats.known import companions_missing
from doctor.lint.testing import tiny, tiny_gptq, use_family


def codes_of(report):
    return {f.code for f in report.findings if not f.consequence_of}


def test_fused_packed_experts_are_one_error_and_missing_experts_follow_from_it(tmp_path):
    from doctor.rules import o619_fused_experts_packed as rule_file

    with use_family("qwen3_moe"):
        case, _message = rule_file.bad()
    report = check(case.write(tmp_path), case.recipe)
    assert codes_of(report) == {"O619"}
    [found] = [f for f in report.findings if f.code == "O619"]
    assert found.evidence == {
        "tensors": 4,
        "experts": 4,
        "names": sorted(n for n in case.tensors if n.endswith("_packed")),
    }
    assert ("engines look for", "model.layers.0.mlp.experts.0.down_proj.weight_packed") in found.facts_table


def test_fused_experts_in_eight_bits_under_their_own_names_are_not_called_unreadable(tmp_path):
    from doctor.rules import o619_fused_experts_packed as rule_file

    with use_family("qwen3_moe"):
        case, _message = rule_file.bad()
    for name in [n for n in case.tensors if n.endswith("_packed")]:
        codes, plain = case.tensors.pop(name), name.removesuffix("_packed")
        case.tensors[plain], case.dtypes[plain] = codes.view(np.uint8), "U8"
        del case.dtypes[name]
    assert "O619" not in {f.code for f in check(case.write(tmp_path), case.recipe).findings}


@pytest.mark.parametrize("kept, expected", [("three sizes", "error"), ("no sizes", "warning")])
def test_vllm_cuts_stacks_of_packed_experts_and_takes_no_shape_of_three_sizes(tmp_path, kept, expected):
    from doctor.rules import o619_fused_experts_packed as rule_file

    with use_family("qwen3_moe"):
        case, _message = rule_file.bad()
    case.recipe = case.recipe.with_field("runtime", "vllm")
    if kept == "no sizes":
        for name in [n for n in case.tensors if n.endswith("_shape")]:
            del case.tensors[name], case.dtypes[name]
    report = check(case.write(tmp_path), case.recipe)
    [found] = [f for f in report.findings if f.code == "O619"]
    assert found.severity == expected
    assert not [f for f in report.findings if f.severity == "error" and f.code != "O619" and not f.consequence_of]


PARTS = ("weight_scale", "weight_scale_2", "input_scale")


def nvfp4(algorithm="NVFP4", also=(), ignore=("lm_head",), both=False):
    """Every projection in ModelOpt's NVFP4, as its export writes it; `also`: more modules."""
    case = tiny()
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if n.endswith("_proj.weight") or n.removesuffix(".weight") in also]:
        module, (n, k) = name.removesuffix(".weight"), case.tensors[name].shape
        scale = rng.integers(0x30, 0x7F, (n, k // 16), np.uint8)
        scale[0, 0] = 0x7E  # 448: the largest of a tensor by construction
        case.tensors |= {
            name: rng.integers(0, 256, (n, k // 2), np.uint8),
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": np.full((), 0.0001, np.float32),
            f"{module}.input_scale": np.full((), 0.02, np.float32),
        }
        case.dtypes |= {name: "U8", f"{module}.weight_scale": "F8_E4M3"}
        case.dtypes |= {f"{module}.{part}": "F32" for part in PARTS[1:]}
    stated = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": list(ignore)}
    case.json["hf_quant_config.json"] = {"producer": {"name": "modelopt"}, "quantization": stated}
    if both:
        case.config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "ignore": list(ignore),
        }
    return case


def packed(preset, static=True):
    """Every projection in a 4-bit float format of compressed-tensors."""
    case = tiny()
    group = 16 if preset.startswith("nv") else 32
    rng = np.random.default_rng(3)
    for name in [n for n in case.tensors if n.endswith("_proj.weight")]:
        n, k = case.tensors.pop(name).shape
        del case.dtypes[name]
        module = name.removesuffix(".weight")
        parts = {
            "weight_packed": (rng.integers(0, 256, (n, k // 2), np.uint8), "U8"),
            "weight_scale": (rng.integers(0x30, 0x7F, (n, k // group), np.uint8), "F8_E4M3"),
            "weight_global_scale": (np.array([2688.0], np.float32), "F32"),
            "input_global_scale": (np.array([300.0], np.float32), "F32"),
        }
        if group == 32:
            parts = {"weight_packed": parts["weight_packed"]}
            parts["weight_scale"] = rng.integers(110, 122, (n, k // group), np.uint8), "U8"
        elif not static:
            del parts["input_global_scale"]
        for part, (codes, dtype) in parts.items():
            case.tensors[f"{module}.{part}"], case.dtypes[f"{module}.{part}"] = codes, dtype
    grid = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group}
    weights = grid | {"strategy": "tensor_group" if group == 16 else "group"}
    activations = weights | {"dynamic": "local"} if static else None
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": f"{preset}-pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
    return case


def serious(report):
    assert not report.crashed, [run.crashed for run in report.crashed]
    return [f"{f.code} {f.message}" for f in report.findings if f.severity != "info" and f.code != "C147"]


@pytest.mark.parametrize("runtime", ["", "vllm"])
@pytest.mark.parametrize(
    "maker",
    [
        nvfp4,
        lambda: nvfp4("W4A16_NVFP4"),
        lambda: nvfp4(both=True),
        lambda: nvfp4(ignore=["lm_head*", "*embed_tokens*"]),
        lambda: packed("nvfp4"),
        lambda: packed("nvfp4", static=False),
        lambda: packed("mxfp4", static=False),
    ],
    ids=["modelopt", "w4a16", "two configs", "patterns", "ct nvfp4", "ct nvfp4a16", "ct mxfp4"],
)
def test_healthy_four_bit_floats_are_silent(tmp_path, maker, runtime):
    case = maker()
    report = check(case.write(tmp_path), case.recipe.with_field("runtime", runtime))
    assert not serious(report), serious(report)


def test_nan_in_block_scales_is_named_with_its_place(tmp_path):
    case = nvfp4()
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    case.tensors[name][3, 0], case.tensors[name][17, 3] = 0x7F, 0xFF
    report = check(case.write(tmp_path), case.recipe)
    [found] = [f for f in report.findings if f.code == "W201"]
    assert found.message.startswith(f"2 NaN among 256 values of {name}") and found.where.index == (3, 0)
    assert "O607" not in {f.code for f in report.findings}


def test_an_exponent_of_255_is_nan(tmp_path):
    case = packed("mxfp4", static=False)
    name = "model.layers.1.self_attn.o_proj.weight_scale"
    case.tensors[name][3, 1] = 255
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "W201"]
    assert found.where.tensor == name and found.where.index == (3, 1)


def test_block_scales_of_zero_are_still_named(tmp_path):
    case = nvfp4()
    case.tensors["model.layers.1.self_attn.o_proj.weight_scale"][0, :2] = 0
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O607"]
    assert found.message == "2 of 256 scales in model.layers.1.self_attn.o_proj.weight_scale are 0"


@pytest.mark.parametrize("part", PARTS)
def test_missing_scale_is_the_cause(tmp_path, part):
    case = nvfp4()
    name = f"model.layers.1.self_attn.o_proj.{part}"
    del case.tensors[name], case.dtypes[name]
    report = check(case.write(tmp_path), case.recipe)
    assert serious(report) == [f"O622 1 quantized weight has no {part} (model.layers.1.self_attn.o_proj.weight)"]
    [found] = [f for f in report.findings if f.code == "O622"]
    assert not found.consequence_of and found.severity == "error"


@pytest.mark.parametrize("part", ["weight_scale", "weight_global_scale", "input_global_scale"])
def test_missing_scale_of_packed_floats_is_named(tmp_path, part):
    case = packed("nvfp4")
    name = f"model.layers.1.self_attn.o_proj.{part}"
    del case.tensors[name], case.dtypes[name]
    report = check(case.write(tmp_path), case.recipe)
    assert serious(report) == [f"O612 model.layers.1.self_attn.o_proj is packed, but has no {part}"]


@pytest.mark.parametrize("maker", [nvfp4, lambda: packed("nvfp4"), lambda: packed("mxfp4", static=False)])
def test_four_bit_floats_are_written_as_plain_numbers_on_request(tmp_path, maker):
    case = maker()
    result = fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    assert result.report.ok, [f"{f.code} {f.message}" for f in result.report.findings]
    assert set(Checkpoint.open(tmp_path / "out").tensors) == set(tiny().tensors)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def fp8(exclude=("lm_head",), plain=()):
    """Every projection in FP8 with one scale a row, but for modules named in `plain`."""
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        if linear.name not in plain:
            n, k = case.tensors[linear.tensor].shape
            case.tensors[linear.tensor] = rng.integers(1, 0x78, (n, k), np.uint8)
            case.tensors[f"{linear.tensor}_scale"] = np.full((n, 1), 0.01, np.float32)
            case.dtypes |= {linear.tensor: "F8_E4M3", f"{linear.tensor}_scale": "F32"}
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": list(exclude),
    }
    return case


def compressed(ignore=("lm_head",), targets=("Linear",), plain=()):
    """Every projection in compressed-tensors' integers, but for modules named in `plain`."""
    case = tiny_gptq()
    floats = tiny()
    for module in [n.removesuffix(".qweight") for n in case.tensors if n.endswith(".qweight")]:
        words = case.tensors.pop(f"{module}.qweight")
        for part in ("qzeros", "scales", "g_idx"):
            del case.tensors[f"{module}.{part}"]
        k, n = words.shape[0] * 8, words.shape[1]
        if module in plain:
            case.tensors[f"{module}.weight"] = floats.tensors[f"{module}.weight"]
            case.dtypes[f"{module}.weight"] = "BF16"
            continue
        case.tensors |= {
            f"{module}.weight_packed": words.reshape(n, k // 8),
            f"{module}.weight_scale": np.full((n, k // 32), 0x2000, np.uint16),
            f"{module}.weight_shape": np.array([n, k], np.int64),
        }
        case.dtypes |= {
            f"{module}.weight_packed": "I32",
            f"{module}.weight_scale": "F16",
            f"{module}.weight_shape": "I64",
        }
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": list(targets), "weights": weights}},
    }
    return case


def gptq(dynamic=None, **config):
    case = tiny_gptq()
    case.config["quantization_config"] |= ({"dynamic": dynamic} if dynamic else {}) | config
    return case


def awq(exclude):
    case = compressed()
    for module in [n.removesuffix(".weight_packed") for n in case.tensors if n.endswith(".weight_packed")]:
        n, k = (int(side) for side in case.tensors.pop(f"{module}.weight_shape"))
        words = case.tensors.pop(f"{module}.weight_packed")
        del case.tensors[f"{module}.weight_scale"]
        case.tensors |= {
            f"{module}.qweight": words.reshape(k, n // 8),
            f"{module}.qzeros": np.full((k // 32, n // 8), 0x77777777, np.int32),
            f"{module}.scales": np.full((k // 32, n), 0x2000, np.uint16),
        }
        case.dtypes |= {f"{module}.qweight": "I32", f"{module}.qzeros": "I32", f"{module}.scales": "F16"}
    case.config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": exclude,
    }  # fmt: skip
    return case


DOWN = "model.layers.0.mlp.down_proj"
HEALTHY = {
    "fp8": fp8,
    "fp8 without a list": lambda: fp8(exclude=()),
    "fp8 with a listed linear": lambda: fp8(exclude=["lm_head", DOWN], plain=[DOWN]),
    "fp8 with a listed layer": lambda: fp8(
        exclude=["lm_head", "model.layers.0"], plain=[x.name for x in tiny().spec.linears if x.block == 0]
    ),
    "fp8 with routers of other models": lambda: fp8(exclude=["lm_head", "mlp.gate", "visual"]),
    "ct": compressed,
    "ct with a pattern": lambda: compressed(["lm_head", r"re:.*\.0\.mlp\.down_proj$"], plain=[DOWN]),
    "ct with targets": lambda: compressed(
        targets=[r"re:.*self_attn.*"], plain=[x.name for x in tiny().spec.linears if ".mlp." in x.name]
    ),
    "gptq": gptq,
    "gptq with a pattern for no module here": lambda: gptq({r"-:.*vision.*": {}}),
    "awq": lambda: awq(None),
    "awq that names routers": lambda: awq(["gate", "lm_head"]),
    "bitsandbytes": lambda: bitsandbytes("nf4"),
    "bitsandbytes that keeps a linear": lambda: bitsandbytes("int8", ["lm_head", "o_proj"], plain=["o_proj"]),
    "nvfp4 with routers": lambda: nvfp4(ignore=["lm_head", "model.layers.0.mlp.gate", "model.embed_tokens"]),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_lists_are_silent(tmp_path, name):
    case = HEALTHY[name]()
    runtime = "transformers" if "bitsandbytes" in name or "listed layer" in name else "vllm"  # vLLM: whole names alone
    report = check(case.write(tmp_path), case.recipe.with_field("runtime", runtime))
    assert not [line for line in serious(report) if not line.startswith("G3")], serious(report)


@pytest.mark.parametrize(
    ("case", "entry", "pointer"),
    [
        (lambda: fp8(exclude=["lm_head", DOWN]), DOWN, "/modules_to_not_convert/1"),
        (lambda: fp8(exclude=["down_proj"]), "down_proj", "/modules_to_not_convert/0"),
        (lambda: compressed(["lm_head", r"re:.*down_proj"]), r"re:.*down_proj", "/ignore/1"),
        (lambda: gptq({r"+:x": {}, r"-:.*down_proj$": {}}), r"-:.*down_proj$", "/dynamic/-:.*down_proj$"),
        (lambda: awq(["lm_head", "down_proj"]), "down_proj", "/modules_to_not_convert/1"),
        (lambda: bitsandbytes("nf4", ["lm_head", DOWN]), DOWN, "/llm_int8_skip_modules/1"),
    ],
    ids=["fp8", "fp8 suffix", "ct", "gptq", "awq", "bitsandbytes"],
)
def test_packed_although_excluded_is_named_at_the_list(tmp_path, case, entry, pointer):
    case = case()
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O623"]
    assert found.severity == "error" and repr(entry) in found.message
    assert found.where.pointer == "/quantization_config" + pointer and DOWN in found.evidence["modules"]


def test_packed_head_is_named_at_the_list_of_hf_quant_config(tmp_path):
    case = nvfp4(also=["lm_head"], ignore=["lm_head*"])
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O623"]
    assert found.message == "lm_head is packed, but 'lm_head*' excludes it from quantization"
    assert (found.where.file, found.where.pointer) == ("hf_quant_config.json", "/quantization/exclude_modules/0")


@pytest.mark.parametrize("case", [lambda: fp8(plain=[DOWN]), lambda: compressed(plain=[DOWN])], ids=["fp8", "ct"])
def test_plain_although_not_excluded_is_a_warning(tmp_path, case):
    case = case()
    found = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O623"]
    assert [(f.severity, f.message) for f in found] == [
        ("warning", f"{DOWN} is stored in 16 bits, but no entry excludes it from quantization")
    ]


def test_an_entry_with_another_prefix_is_shown_beside_what_it_meant(tmp_path):
    case = fp8(exclude=["lm_head", f"language_model.{DOWN}"], plain=[DOWN])
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O623"]
    assert found.severity == "warning" and found.evidence["entries_without_module"] == [f"language_model.{DOWN}"]


def test_an_entry_that_matches_nothing_is_a_note(tmp_path):
    case = fp8(exclude=["lm_head", "model.layers.7.mlp.down_proj"])
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O623"]
    assert found.severity == "info" and "model.layers.7.mlp.down_proj" in found.message


def test_a_router_in_eight_bits_is_named_as_packed_ones_are(tmp_path):
    case = tiny("qwen3_moe")
    name = "model.layers.0.mlp.gate.weight"
    n, k = case.tensors[name].shape
    case.tensors[name] = np.random.default_rng(3).integers(1, 0x78, (n, k), np.uint8)
    case.tensors[f"{name}_scale"] = np.full((n, 1), 0.01, np.float32)
    case.dtypes |= {name: "F8_E4M3", f"{name}_scale": "F32"}
    case.config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    found = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O613"]
    assert [f.message for f in found] == [f"{name}: router is packed"]


def int8(exclude=("lm_head",), rows=True):
    """Every projection in compressed-tensors' 8-bit integers."""
    case, rng = tiny(), np.random.default_rng(3)
    for linear in case.spec.linears:
        n, k = case.tensors[linear.tensor].shape
        case.tensors[linear.tensor] = rng.integers(-127, 128, (n, k), np.int8)
        scale = np.full((n, 1) if rows else (1,), 0.01, np.float32)
        case.tensors[f"{linear.tensor}_scale"] = scale
        case.dtypes |= {linear.tensor: "I8", f"{linear.tensor}_scale": "F32"}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel" if rows else "tensor"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": list(exclude),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    return case


def bitsandbytes(kind, skipped=("lm_head",), plain=()):
    """What transformers saves of a model that bitsandbytes loaded, with its quantization_config; `plain`: linears that
    stay in 16 bits.
    """
    from doctor.rules import o620_bitsandbytes_leftovers as leftovers

    case = leftovers.bad()[0] if kind == "int8" else leftovers.packed_in_four_bits(kind)
    case.config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": list(skipped),
    }
    floats = tiny()
    for name in [n for n in floats.tensors if any(f".{kept}." in n for kept in plain)]:
        module = name.removesuffix(".weight")
        for part in [n for n in case.tensors if n.startswith(f"{module}.")]:
            del case.tensors[part]
            case.dtypes.pop(part, None)
        case.tensors[name], case.dtypes[name] = floats.tensors[name], "BF16"
    return case


MORE_HEALTHY = {
    "int8 rows": int8,
    "int8 tensor": lambda: int8(rows=False),
    "bitsandbytes 8 bits": lambda: bitsandbytes("int8"),
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes fp4": lambda: bitsandbytes("fp4"),
}


@pytest.mark.parametrize("name", MORE_HEALTHY)
@pytest.mark.parametrize("stage", ["header", "output"])
def test_healthy_eight_bits_and_bitsandbytes_are_silent(tmp_path, name, stage):
    case = MORE_HEALTHY[name]()
    reader = "transformers" if name.startswith("bitsandbytes") else "vllm"  # vLLM 0.32 has no reader for bitsandbytes
    report = check(case.write(tmp_path), case.recipe.with_field("runtime", reader), stage=stage)
    assert not serious(report), serious(report)


def test_bitsandbytes_for_an_engine_that_does_not_read_it_is_the_one_error(tmp_path):
    case = bitsandbytes("nf4")
    report = check(case.write(tmp_path), case.recipe.with_field("runtime", "vllm"), stage="header")
    assert serious(report) == ["G331 vllm 0.32.0 has no reader for quant_method bitsandbytes; transformers has one"]


def test_eight_bit_rows_are_written_as_plain_numbers_on_request(tmp_path):
    case = int8()
    name = case.name("down")
    result = fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    assert result.report.ok
    out = Checkpoint.open(tmp_path / "out")
    values = from_codes(out.load(name), out.tensors[name].dtype.name)
    np.testing.assert_allclose(values, case.tensors[name] * np.float32(0.01), rtol=1 / 256)


@pytest.mark.parametrize("runtime, severity", [("vllm", "error"), ("", "warning")])
def test_parts_of_a_fused_matrix_in_two_precisions_are_named_in_any_format(tmp_path, runtime, severity):
    kept = "model.layers.1.self_attn.k_proj"
    case = fp8(exclude=["lm_head", kept], plain=[kept])
    [found] = [
        f for f in check(case.write(tmp_path), case.recipe.with_field("runtime", runtime)).findings if f.code == "G307"
    ]
    assert found.severity == severity and found.message.startswith(
        "model.layers.1.self_attn: q and v in 8 bits and k in"
    )


def test_groups_of_sixteen_are_judged_under_tensor_parallel(tmp_path):
    case = nvfp4()
    folder = case.write(tmp_path)
    for tp, wrong in ((2, False), (4, False), (8, True)):  # 128 / 8 = 16 fits, o's 64 / 8 = 8 does not; so do the heads
        recipe = case.recipe.with_field("runtime", "vllm").with_field("tp", tp)
        assert ("G320" in {f.code for f in check(folder, recipe, stage="header").findings}) == wrong


@pytest.mark.parametrize("style", ["fp8", "compressed-tensors"])
def test_eight_bit_weight_without_any_scale_is_named(tmp_path, style):
    case = fp8()
    if style != "fp8":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
        case.config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    assert not serious(check(case.write(tmp_path / "whole"), case.recipe))
    del case.tensors[f"{DOWN}.weight_scale"], case.dtypes[f"{DOWN}.weight_scale"]
    report = check(case.write(tmp_path / "cut"), case.recipe)
    assert serious(report) == [f"O622 1 quantized weight has no weight_scale ({DOWN}.weight)"]


def test_two_files_with_two_labels_are_a_warning(tmp_path):
    case = nvfp4(both=True)
    case.json["hf_quant_config.json"]["quantization"]["quant_algo"] = "W4A16_NVFP4"
    [found] = [f for f in check(case.write(tmp_path), case.recipe).findings if f.code == "O654"]
    assert (found.severity, found.message) == (
        "warning",
        "config.json says NVFP4, and hf_quant_config.json says W4A16_NVFP4",
    )


def test_a_plain_linear_that_bitsandbytes_would_read_as_codes_is_named(tmp_path):
    case = bitsandbytes("int8", plain=["o_proj"])
    report = check(case.write(tmp_path), case.recipe.with_field("runtime", "transformers"))
    assert [line for line in serious(report) if line.startswith("O623")] == [
        "O623 2 linears are stored in 16 bits, but no entry excludes them from quantization "
        "(first model.layers.0.self_attn.o_proj)"
    ]


# Shapes of mlx 0.32.4's nn.Linear(128, 64).to_quantized(group_size, bits, mode), as it makes them.
MLX = {
    ("affine", 32, 4): {"weight": (64, 16), "scales": (64, 4), "biases": (64, 4)},
    ("affine", 64, 3): {"weight": (64, 12), "scales": (64, 2), "biases": (64, 2)},
    ("affine", 64, 8): {"weight": (64, 32), "scales": (64, 2), "biases": (64, 2)},
    ("mxfp4", 32, 4): {"weight": (64, 16), "scales": (64, 4)},
    ("nvfp4", 16, 4): {"weight": (64, 16), "scales": (64, 8)},
    ("mxfp8", 32, 8): {"weight": (64, 32), "scales": (64, 4)},
}


def mlx(mode, group, bits, parts):
    """tiny() with the down projections of MLX, and o_proj of the first layer in 4 bits of its own."""
    case = tiny()
    own = {"weight": (64, 8), "scales": (64, 2), "biases": (64, 2)}
    modules = {case.name("down", layer).removesuffix(".weight"): parts for layer in (0, 1)}
    modules[case.name("o").removesuffix(".weight")] = own
    for module, shapes in modules.items():
        del case.tensors[f"{module}.weight"]
        for part, shape in shapes.items():
            kind = "U32" if part == "weight" else "U8" if mode != "affine" and shapes is parts else "F16"
            codes = np.full(shape, 0x34, {"U32": np.uint32, "U8": np.uint8, "F16": np.uint16}[kind])
            case.tensors[f"{module}.{part}"], case.dtypes[f"{module}.{part}"] = codes, kind
    o = case.name("o").removesuffix(".weight")
    stated = {"group_size": group, "bits": bits, "mode": mode, o: {"group_size": 32, "bits": 4, "mode": "affine"}}
    case.config["quantization"] = stated
    return case


@pytest.mark.parametrize("kind", MLX, ids=str)
def test_parts_of_mlx_are_judged_by_its_modes(tmp_path, kind):
    found = [f for f in check(mlx(*kind, MLX[kind]).write(tmp_path / "whole")).findings if f.code == "O625"]
    assert found == []
    case = mlx(*kind, MLX[kind])
    down = case.name("down").removesuffix(".weight")
    del case.tensors[f"{down}.scales"], case.dtypes[f"{down}.scales"]
    [found] = [f for f in check(case.write(tmp_path / "cut")).findings if f.code == "O625"]
    assert found.message == f"{down} is packed, but has no scales" and found.severity == "error"
    case = mlx(*kind, MLX[kind] | {"scales": (64, 1)})
    found = [f.message for f in check(case.write(tmp_path / "narrow")).findings if f.code == "O625"]
    assert found and all("scales is [64, 1]; its words" in message for message in found)


def test_an_mlx_modules_own_entry_takes_nothing_from_the_entry_for_all(tmp_path):
    case = mlx("mxfp4", 32, 4, MLX["mxfp4", 32, 4])
    o = case.name("o").removesuffix(".weight")
    case.config["quantization"][o] = {"group_size": 32, "bits": 4}  # no mode: affine, as mlx's to_quantized defaults
    assert "O625" not in codes_of(check(case.write(tmp_path / "whole")))
    del case.tensors[f"{o}.biases"], case.dtypes[f"{o}.biases"]
    [found] = [f for f in check(case.write(tmp_path / "cut")).findings if f.code == "O625"]
    assert found.message == f"{o} is packed, but has no biases"


@pytest.mark.parametrize(
    ("words", "parts", "absent"),
    [
        ("q_weight", ("q_scale", "q_scale_max", "q_groups", "q_perm"), ["q_invperm"]),  # q_perm is computed from it
        ("q_weight", ("q_scale", "q_scale_max", "q_groups", "q_invperm"), []),
        ("W_q", ("zero_scale",), []),  # hqq's offload_meta keeps both in one tensor
        ("W_q", ("zero",), ["scale"]),
        ("trellis", ("su", "svh"), []),
        ("trellis", ("suh",), ["svh"]),
    ],
)
def test_parts_of_formats_that_are_not_unpacked_are_those_that_their_loaders_ask_for(words, parts, absent):
    held = {f"m.{part}" for part in (words, *parts)}
    assert companions_missing(held, f"m.{words}") == absent


def test_a_wrong_exclude_list_does_not_keep_weights_from_becoming_plain_by_name(tmp_path):
    case = nvfp4(ignore=["lm_head", DOWN])
    result = fix(case.write(tmp_path / "in"), tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    assert result.report.ok, [f.message for f in result.report.findings]
    assert {i.dtype.name for i in Checkpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}


def test_a_wrong_label_with_scales_of_two_formats_is_not_made_plain(tmp_path):
    from doctor.rules.o621_stored_bits_differ import bad

    case, _message = bad()
    [found] = [f for f in check(case.write(tmp_path / "in"), case.recipe).findings if f.code == "C147"]
    assert found.fix.safety == "manual" and not found.fix.edits


def test_an_awq_file_with_zero_points_and_no_word_of_them_is_an_info_as_a_gpu_reads_them(tmp_path):
    case = awq(None)
    case.tensors[f"{DOWN}.qzeros"][0, 0] = 0x12345678
    assert not serious(check(case.write(tmp_path / "said"), case.recipe))
    case.config["quantization_config"]["zero_point"] = False
    report = check(case.write(tmp_path / "unsaid"), case.recipe)
    assert [f.severity for f in report.findings if f.code == "O657"] == ["info"]


def test_biases_beside_packed_words_matter_where_the_class_has_none_and_they_are_not_zero(tmp_path):
    case = awq(None)
    for name in (f"{DOWN}.bias", f"{DOWN}.bias".replace(".0.", ".1.")):
        case.tensors[name], case.dtypes[name] = np.zeros(64, np.uint16), "F16"
    assert not serious(check(case.write(tmp_path / "zeros"), case.recipe))
    case.tensors[f"{DOWN}.bias"][5] = 0x3C00
    [line] = serious(check(case.write(tmp_path / "values"), case.recipe))
    assert line.startswith(f"F066 1 linear has a bias that LlamaForCausalLM does not read ({DOWN}.bias)")


@pytest.mark.parametrize(
    "runtime, exclude, expected",
    [("vllm", (), [("error", "O623")]), ("vllm", ("re:.*mlp.gate$",), []), ("", (), []), ("transformers", (), [])],
)
def test_a_router_that_no_entry_excludes_is_named_where_vllm_would_take_it_as_packed(
    tmp_path, runtime, exclude, expected
):
    with use_family("qwen3_moe"):
        case = compressed(ignore=("lm_head", *exclude))
    case.recipe = case.recipe.with_field("runtime", runtime)
    report = check(case.write(tmp_path), case.recipe)
    assert [(f.severity, f.code) for f in report.findings if f.severity == "error"] == expected, report.findings
