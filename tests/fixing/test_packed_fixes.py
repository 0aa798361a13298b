"""Fixes of packed weights: dequantization, zero points, g_idx."""

import numpy as np
import pytest
from fix_cases import codes, quantized

from doctor.api import check, fix
from doctor.checkpoint.codecs import to_bf16
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.lint.testing import tiny

FORMS = [
    ("gptq", 4, True, False),
    ("gptq", 3, False, False),
    ("gptq_v2", 8, True, True),
    ("gptq_v2", 2, False, False),
    ("awq", 4, False, False),
    ("compressed-tensors", 4, True, False),
    ("compressed-tensors", 8, False, False),
]


@pytest.mark.parametrize("form, bits, sym, act_order", FORMS)
def test_packed_weights_become_the_numbers_that_engines_compute_with(tmp_path, form, bits, sym, act_order):
    from doctor.quant.dequantize import as_float

    case, source = quantized(tmp_path / "source", form, bits, sym, act_order)
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    assert codes(result) == {"C147"} and not (tmp_path / "out" / "quantize_config.json").exists()
    out, want = Checkpoint.open(tmp_path / "out"), as_float(Checkpoint.open(source))
    assert set(out.tensors) == set(tiny("llama").tensors) and "quantization_config" not in out.value("config.json")
    for name, info in out.tensors.items():
        assert info.dtype.name == "BF16"
        if "_proj.weight" in name:
            assert (out.load(name) == to_bf16(want.load(name))).all(), name
    assert not check(tmp_path / "out", case.recipe).findings


def test_a_packed_checkpoint_that_nobody_asked_to_unpack_stays(tmp_path):
    case, source = quantized(tmp_path / "source", "gptq")
    result = fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True)
    assert not result.plan.steps and "C147" not in {f.code for f in result.plan.before.findings}


@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_fp8_becomes_value_times_scale(tmp_path, scales):
    import torch

    case = tiny("llama")
    rng = np.random.default_rng(3)
    kept, tile = {}, [32, 64]
    for name in [n for n in case.tensors if "_proj.weight" in n]:
        n, k = case.tensors[name].shape
        case.tensors[name] = rng.integers(0, 0x7F, (n, k), np.uint8) | rng.integers(0, 2, (n, k), np.uint8) << 7
        shape = {"tensor": (1,), "row": (n, 1), "block": (-(-n // tile[0]), -(-k // tile[1]))}[scales]
        scale = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
        tail = "_scale_inv" if scales == "block" else "_scale"
        case.tensors[name + tail], case.dtypes[name], case.dtypes[name + tail] = scale, "F8_E4M3", "F32"
        wide = scale if scales != "block" else scale.repeat(tile[0], 0)[:n].repeat(tile[1], 1)[:, :k]
        kept[name] = (torch.from_numpy(case.tensors[name]).view(torch.float8_e4m3fn).float().numpy() * wide).astype(
            np.float32
        )
    case.config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": tile if scales == "block" else None,
    }
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe, unsafe_fixes=("C147",))
    out = Checkpoint.open(tmp_path / "out")
    assert codes(result) == {"C147"} and set(out.tensors) == set(tiny("llama").tensors)
    for name, want in kept.items():
        assert (out.load(name) == to_bf16(want)).all()


def test_every_e4m3_code_is_read_as_torch_reads_it():
    import torch

    from doctor.edits.dequantized import E4M3_VALUES

    want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(E4M3_VALUES, want, equal_nan=True) and np.isnan(E4M3_VALUES).sum() == 2


def test_zero_points_move_to_version_1_where_the_config_has_no_key_for_versions(tmp_path):
    from doctor.lint.testing import tiny_gptq

    case = tiny_gptq("llama", version="gptq_v2")
    case.config["quantization_config"].pop("checkpoint_format", None)
    result = fix(case.write(tmp_path / "source"), tmp_path / "out", case.recipe)
    out = Checkpoint.open(tmp_path / "out")
    names = [n for n in out.tensors if n.endswith(".qzeros")]
    assert codes(result) == {"O608"} and len(names) == 14 and all((out.load(n) == 0x77777777).all() for n in names)
    assert out.value("config.json") == case.config


def test_a_zero_point_that_cannot_move_is_refused():
    from doctor.edits.arithmetic import shift_fields

    with pytest.raises(PlanRefused, match="w: 1 zero points are 0 and cannot move by -1 in 4 bits"):
        shift_fields(np.array([0x11111101], np.uint32).view(np.int32), 4, -1, "w")
    assert (
        shift_fields(np.array([0x77777777], np.uint32).view(np.int32), 4, 1, "w").view(np.uint32) == 0x88888888
    ).all()


def test_absent_and_wrong_group_indices_are_written_in_order(tmp_path):
    from doctor.lint.testing import tiny_gptq

    case = tiny_gptq("llama")
    one, other = case.packed("down") + ".g_idx", case.packed("down", 1) + ".g_idx"
    want = case.tensors.pop(one)
    case.tensors[other] = case.tensors[other] + 1
    source = case.write(tmp_path / "source")
    assert (fix(source, tmp_path / "safe", case.recipe).plan.overlay.load(one) == want).all()
    fix(source, tmp_path / "out", case.recipe, unsafe_fixes=True)
    out = Checkpoint.open(tmp_path / "out")
    assert (
        (out.load(one) == want).all()
        and (out.load(other) == want).all()
        and not check(tmp_path / "out", case.recipe).findings
    )
