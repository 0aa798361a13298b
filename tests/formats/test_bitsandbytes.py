"""Weights packed by bitsandbytes become the numbers that bitsandbytes computes with, by its published formulas."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from doctor.rules import o620_bitsandbytes_leftovers as leftovers

from doctor.api import check, fix
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.edits.dequantized import DequantizedTensor
from doctor.edits.kinds import Dequantize
from doctor.formats.registry import KNOWN
from doctor.lint.testing import tiny

PLAN = Recipe(group_size=32)
installed = importlib.util.find_spec("bitsandbytes") is not None


def reference_rows(codes, largest):
    """8 bits, element by element: code * SCB * (1 / 127), float32 after each step."""
    out = np.empty(codes.shape, np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            out[row, column] = np.float32(np.float32(codes[row, column]) * largest[row]) * np.float32(1 / 127)
    return out


def reference_blocks(tensors, name):
    """4 bits, element by element, as QuantState.from_dict and dequantize_4bit describe it."""
    [key] = [n for n in tensors if n.startswith(f"{name}.quant_state.bitsandbytes__")]
    state = json.loads(tensors[key].tobytes())
    table, absmax = tensors[f"{name}.quant_map"], tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:
        outer, inner = tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
        absmax = [
            np.float32(
                np.float32(inner[code] * outer[i // state["nested_blocksize"]]) + np.float32(state["nested_offset"])
            )
            for i, code in enumerate(absmax)
        ]
    out = []
    for i, byte in enumerate(tensors[name].reshape(-1).tolist()):
        for j, code in enumerate((byte >> 4, byte & 15)):
            out.append(np.float32(table[code] * absmax[(2 * i + j) // state["blocksize"]]))
    return np.array(out, np.float32).reshape(state["shape"])


def rounded(values):
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def weight(folder, name):
    checkpoint = Checkpoint.open(folder)
    return from_codes(checkpoint.load(name), checkpoint.tensors[name].dtype.name)


@pytest.mark.parametrize(
    "case_of",
    [
        lambda: leftovers.bad()[0],
        lambda: leftovers.packed_in_four_bits("nf4"),
        lambda: leftovers.packed_in_four_bits("fp4", nested=False),
    ],
    ids=["int8", "nf4 nested", "fp4"],
)
def test_fix_writes_the_numbers_of_the_published_formula(tmp_path, case_of):
    case = case_of()
    before = case.write(tmp_path / "in")
    report = check(before, PLAN)
    assert [f.code for f in report.findings if not f.consequence_of] == ["O620"]
    result = fix(before, tmp_path / "out", PLAN, unsafe_fixes=True)
    assert not [f for f in result.report.findings if f.severity == "error"]
    stored = Checkpoint.open(tmp_path / "out")
    assert set(stored.tensors) == set(tiny().tensors)
    for name in (n for n in case.tensors if n.endswith("_proj.weight")):
        module = name.removesuffix(".weight")
        wanted = (
            reference_rows(case.tensors[name], case.tensors[f"{module}.SCB"])
            if f"{module}.SCB" in case.tensors
            else reference_blocks(case.tensors, name)
        )
        assert stored.tensors[name].dtype.name == "BF16"
        np.testing.assert_array_equal(weight(tmp_path / "out", name), rounded(wanted))


def test_parts_of_rows_are_the_same_as_all_rows():
    form = KNOWN["bitsandbytes"]
    case = leftovers.packed_in_four_bits()
    name = case.name("down")
    parts = {"weight": case.tensors[name]} | {
        n.removeprefix(name.removesuffix("weight")): codes
        for n, codes in case.tensors.items()
        if n.startswith(name + ".")
    }
    whole = form.unpack(parts, scheme_of(4), (64, 128))
    some = [form.unpack(parts, scheme_of(4), (64, 128), slice(at, min(at + 7, 64))) for at in range(0, 64, 7)]
    np.testing.assert_array_equal(np.concatenate(some), whole)


def scheme_of(bits):
    from doctor.core.recipe import Scheme

    return Scheme(bits)


def test_codes_in_tiles_of_an_old_kernel_are_refused_not_guessed(tmp_path):
    case = leftovers.bad()[0]
    case.tensors["model.layers.0.mlp.down_proj.weight_format"] = np.full((), 2, np.uint8)
    source = Checkpoint.open(case.write(tmp_path))
    made = DequantizedTensor(source, Dequantize("model.layers.0.mlp.down_proj.weight", (64, 128), "bitsandbytes", 8))
    with pytest.raises(Exception, match="weight_format is 2"):
        made.rows(0, 64)


def test_with_its_quantization_config_the_form_is_no_defect_of_the_files(tmp_path):
    case = leftovers.packed_in_four_bits()
    case.config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    assert "O620" not in {f.code for f in check(case.write(tmp_path), PLAN).findings}


@pytest.mark.parametrize("maker", [lambda: leftovers.bad()[0], leftovers.packed_in_four_bits])
def test_no_fix_drops_the_scales(tmp_path, maker):
    report = check(maker().write(tmp_path), PLAN)
    assert "F052" not in {f.code for f in report.findings}


def test_a_broken_state_leaves_the_fix_to_the_user(tmp_path):
    case = leftovers.packed_in_four_bits()
    name = "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4"
    case.tensors[name] = np.frombuffer(b'{"shape": [64', np.uint8)
    [found] = [f for f in check(case.write(tmp_path), PLAN).findings if f.code == "O620"]
    assert found.fix.safety == "manual"


@pytest.mark.skipif(not installed, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_library_itself_unpacks_to_the_same_numbers(tmp_path, kind, nested):
    from bitsandbytes import functional

    case = tiny()
    name = case.name("down")
    plain = torch.from_numpy(from_codes(case.tensors[name], "BF16"))
    packed, state = functional.quantize_4bit(plain, quant_type=kind, compress_statistics=nested, blocksize=64)
    case.tensors[name], case.dtypes[name] = packed.numpy(), "U8"
    for part, value in state.as_dict(packed=True).items():
        dtype = {torch.float32: "F32", torch.uint8: "U8"}[value.dtype]
        case.tensors[f"{name}.{part}"], case.dtypes[f"{name}.{part}"] = value.numpy(), dtype
    source = Checkpoint.open(case.write(tmp_path))
    ours = DequantizedTensor(source, Dequantize(name, tuple(plain.shape), "bitsandbytes", 4, dtype="F32")).rows(0, 64)
    theirs = functional.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(not installed, reason="bitsandbytes is not installed")
def test_the_library_itself_unpacks_rows_to_the_same_numbers(tmp_path):
    from bitsandbytes import functional

    case = leftovers.bad()[0]
    name = case.name("down")
    module = name.removesuffix(".weight")
    source = Checkpoint.open(case.write(tmp_path))
    ours = DequantizedTensor(source, Dequantize(name, (64, 128), "bitsandbytes", 8, dtype="F32")).rows(0, 64)
    theirs = functional.int8_vectorwise_dequant(
        torch.from_numpy(case.tensors[name]), torch.from_numpy(case.tensors[f"{module}.SCB"])
    )
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_plan_says_that_the_scales_are_dropped(tmp_path):
    from doctor.report.plan_text import render_plan

    folder = leftovers.bad()[0].write(tmp_path / "in")
    text = render_plan(fix(folder, tmp_path / "out", PLAN, unsafe_fixes=True, dry_run=True))
    assert "u8 [] dropped" in text and "f32 [64] dropped" in text and "added" not in text
