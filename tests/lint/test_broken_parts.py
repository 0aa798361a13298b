"""Stored formats of which one part is not what its readers take, as transformers 5.23 with gptqmodel 7.7 and
compressed-tensors 0.20 answered for files broken in one way each.
"""

import importlib

import numpy as np
import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny, tiny_gptq, tiny_packed


def judged(case, tmp_path):
    """code -> severity of what is said of the file as transformers would serve it."""
    report = check(case.write(tmp_path), Recipe(goal="serve", runtime="transformers"))
    return {f.code: f.severity for f in report.findings if not f.consequence_of and f.severity != "info"}


@pytest.fixture
def case():
    return tiny_gptq()


def test_a_sound_file_is_silent(case, tmp_path):
    assert judged(case, tmp_path) == {}


@pytest.mark.parametrize("change", [np.transpose, lambda zeros: zeros[:-1], lambda zeros: zeros[:, :-1]])
def test_zero_points_of_another_shape_are_an_error(case, change, tmp_path):
    name = f"{case.packed('down')}.qzeros"
    case.tensors[name] = np.ascontiguousarray(change(case.tensors[name]))
    assert judged(case, tmp_path) == {"O612": "error"}


def test_a_group_index_that_is_too_short_is_an_error(case, tmp_path):
    name = f"{case.packed('down')}.g_idx"
    case.tensors[name] = case.tensors[name][:-4]
    assert judged(case, tmp_path) == {"O610": "error"}


def test_words_in_64_bits_are_copied_over_and_no_error(case, tmp_path):
    name = f"{case.packed('down')}.qweight"
    case.tensors[name], case.dtypes[name] = case.tensors[name].astype(np.int64), "I64"
    assert judged(case, tmp_path) == {"O650": "warning"}


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_gptq_file_that_calls_itself_awq_is_an_error(case, version, tmp_path):
    case.config["quantization_config"] |= {"quant_method": "awq", "checkpoint_format": version, "zero_point": True}
    assert judged(case, tmp_path)["O651"] == "error"


@pytest.mark.parametrize("target, taken", [("Linear", True), ("ColumnParallelLinear", True), ("Conv2d", False)])
def test_a_class_as_target_takes_linears_only_where_they_are_of_it(target, taken, tmp_path):
    found = judged(tiny_packed(targets=[target]), tmp_path)
    assert ("O652" not in found) == taken and (taken or found["O652"] == "error")


@pytest.mark.parametrize("runtime, severity", [("transformers", "error"), ("", "warning"), ("vllm", None)])
def test_a_head_that_no_entry_excludes_is_packed_by_transformers_alone(runtime, severity, tmp_path):
    case = tiny_packed()
    case.config["quantization_config"]["ignore"] = ["lm_haed"]
    assert "lm_head.weight" in case.tensors
    report = check(case.write(tmp_path), Recipe(goal="serve", runtime=runtime))
    said = [f.severity for f in report.findings if f.code == "O623" and "lm_head is stored" in f.message]
    assert said == ([severity] if severity else [])


def test_a_missing_group_index_is_an_error_for_transformers(case, tmp_path):
    del case.tensors[f"{case.packed('down')}.g_idx"], case.dtypes[f"{case.packed('down')}.g_idx"]
    assert judged(case, tmp_path)["O610"] == "error"


def test_an_order_that_compressed_tensors_removed_is_refused_since_transformers_5(tmp_path):
    case = tiny_packed()
    case.config["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    folder = case.write(tmp_path)
    for version, refused in (("5.23.0", True), ("4.57.1", False)):
        report = check(folder, Recipe(goal="serve", runtime="transformers", runtime_version=version))
        assert ("O651" in {f.code for f in report.findings if f.severity == "error"}) == refused


def zeroed(case, tail):
    """The case with the tensor of this ending set to 0 in its first such linear."""
    name = min(name for name in case.tensors if name.endswith(tail))
    case.tensors[name] = np.zeros_like(case.tensors[name])
    return case


@pytest.mark.parametrize(
    "case, tail",
    [
        (tiny_gptq(), ".scales"),
        (tiny_gptq(version="gptq_v2"), ".scales"),
        (tiny_packed(), ".weight_scale"),
        (tiny_packed("nvfp4-pack-quantized"), ".weight_scale"),
        (tiny_packed("nvfp4-pack-quantized"), ".weight_global_scale"),
    ],
)
def test_codes_without_any_scale_are_an_error(case, tail, tmp_path):
    assert judged(zeroed(case, tail), tmp_path) == {"O659": "error"}


def test_8_bit_floats_without_any_scale_are_an_error(tmp_path):
    case = zeroed(importlib.import_module("doctor.rules.o650_parts_not_as_stated").good(), ".weight_scale")
    assert judged(case, tmp_path)["O659"] == "error"


def test_a_linear_that_is_0_in_codes_too_may_be_pruned(case, tmp_path):
    name = f"{case.packed('down')}.qweight"
    case.tensors[name] = np.full_like(case.tensors[name], np.uint32(0x88888888).view(np.int32))
    case.tensors[f"{case.packed('down')}.scales"] = np.zeros_like(case.tensors[f"{case.packed('down')}.scales"])
    assert "error" not in judged(case, tmp_path).values()


def test_sizes_that_are_too_large_cut_nothing(tmp_path):
    case = tiny_packed()
    name = min(name for name in case.tensors if name.endswith(".weight_shape"))
    case.tensors[name] = case.tensors[name] * 2
    assert judged(case, tmp_path) == {"O650": "warning"}


@pytest.mark.parametrize("vision, runtime, said", [(True, "", True), (True, "vllm", False), (False, "", False)])
def test_a_tower_in_the_gptq_format_is_refused_for_transformers(vision, runtime, said, tmp_path):
    recipe, case = Recipe(group_size=32, format="gptq", goal="quantize", vision=vision, runtime=runtime), tiny()
    case.config["vision_config"] = {}
    report = check(case.write(tmp_path), recipe, stage="header")
    assert ("G323" in {f.code for f in report.findings}) is said
