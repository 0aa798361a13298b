"""Packed linears whose codes are all the same: which are named, and what is no defect."""

import numpy as np
import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny, tiny_gptq
from doctor.scan import scan as scan_module

PLAN = Recipe(group_size=32)


def findings(case, folder, code="O618"):
    return [f for f in check(case.write(folder), case.recipe).findings if f.code == code]


def words(value, shape):
    return np.full(shape, np.uint32(value).view(np.int32), np.int32)


def test_whole_model_of_zero_words_is_one_error_that_says_in_which_linears(tmp_path):
    case = tiny_gptq()
    packed = [n for n in case.tensors if n.endswith(".qweight")]
    for name in packed:
        case.tensors[name] = np.zeros_like(case.tensors[name])
    [found] = findings(case, tmp_path)
    assert found.severity == "error"
    assert found.message == (
        "14 linears hold one code everywhere: every element of their packed codes is 0x00000000 "
        "(first model.layers.0.mlp.down_proj.qweight)"
    )
    assert found.evidence["tensors"] == sorted(packed)
    assert ("self_attn.q_proj", "{0-1}", "0") in found.facts_table


@pytest.mark.parametrize(
    ("zeros", "code", "severity"),
    [(0x77777777, 0x88888888, "warning"), (0x77777777, 0x77777777, "error"), (0x76777777, 0x88888888, "error")],
)
def test_codes_that_are_the_zero_point_are_weights_of_zero(tmp_path, zeros, code, severity):
    case = tiny_gptq()
    module = case.packed("down")
    case.config["quantization_config"]["sym"] = False
    case.tensors[f"{module}.qweight"] = words(code, case.tensors[f"{module}.qweight"].shape)
    case.tensors[f"{module}.qzeros"] = words(zeros, case.tensors[f"{module}.qzeros"].shape)
    [found] = findings(case, tmp_path)
    assert found.severity == severity


def test_one_other_word_in_the_last_chunk_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "CHUNK_BYTES", 256)
    case = tiny_gptq()
    name = case.packed("down") + ".qweight"
    case.tensors[name] = np.zeros_like(case.tensors[name])
    assert findings(case, tmp_path / "same")
    case.tensors[name][-1, -1] = 1
    assert not findings(case, tmp_path / "other")


@pytest.mark.parametrize(
    ("dtype", "value", "severity"), [("I8", 5, "error"), ("I8", 0, "warning"), ("U8", 0x77, "error")]
)
def test_bytes_of_codes_are_looked_at_too(tmp_path, dtype, value, severity):
    case = tiny()
    name = case.name("down")
    shape = case.tensors[name].shape
    case.tensors[name], case.dtypes[name] = np.full(shape, value, np.uint8), dtype
    case.tensors[f"{name}_scale"], case.dtypes[f"{name}_scale"] = np.ones((shape[0], 1), np.float32), "F32"
    [found] = findings(case, tmp_path)
    assert (found.severity, found.where.tensor) == (severity, name)
