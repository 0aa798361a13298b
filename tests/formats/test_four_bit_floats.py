"""NVFP4, MXFP4 and MXFP8: bytes decode to the numbers of compressed-tensors' own vectors, in NumPy and in torch."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from doctor.core.errors import BadCheckpoint
from doctor.core.recipe import Scheme
from doctor.formats.grid import e4m3_values
from doctor.formats.mxfp4 import powers, unpack_experts
from doctor.formats.registry import KNOWN

VECTORS = Path(__file__).parents[2] / "fixtures" / "vectors"
E4M3 = e4m3_values()
FORMS = {"ct_nvfp4_out8_in64": "nvfp4-pack-quantized", "ct_mxfp4_out8_in64": "mxfp4-pack-quantized"}
FORMS["ct_mxfp8_out8_in64"] = "mxfp8-quantized"


def array(tensor):
    """A tensor of a vector, 8-bit floats as float32."""
    width = {"U8": 2, "F8_E4M3": 2, "BF16": 4, "F32": 8}[tensor["dtype"]]
    digits = tensor["hex"].replace(" ", "")
    words = np.array([int(digits[at : at + width], 16) for at in range(0, len(digits), width)], np.uint32)
    if tensor["dtype"] == "F32":
        found = words.view(np.float32)
    elif tensor["dtype"] == "BF16":
        found = (words << 16).view(np.float32)
    else:
        found = E4M3[words] if tensor["dtype"] == "F8_E4M3" else words.astype(np.uint8)
    return found.reshape(tensor["shape"])


def vector(name):
    read = json.loads((VECTORS / f"{name}.json").read_text())
    return {part: array(tensor) for part, tensor in read["tensors"].items()}, array(read["decoded_f32"])


@pytest.mark.parametrize("rows", [None, slice(0, 8), slice(3, 5)])
@pytest.mark.parametrize("as_torch", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", FORMS)
def test_bytes_of_the_library_decode_to_its_numbers(name, as_torch, rows):
    parts, wanted = vector(name)
    form = KNOWN[FORMS[name]]
    if as_torch:
        parts = {part: torch.from_numpy(np.ascontiguousarray(codes)) for part, codes in parts.items()}
    found = np.asarray(form.unpack(parts, Scheme(4, form.groups[0]), (8, 64), rows))
    np.testing.assert_array_equal(found, wanted[rows or slice(None)])


def test_modelopt_multiplies_by_its_second_scale():
    parts, wanted = vector("ct_nvfp4_out8_in64")
    second = np.float32(1) / parts["weight_global_scale"]
    found = KNOWN["nvfp4"].unpack(
        {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"], "weight_scale_2": second},
        Scheme(4, 16),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_parts_have_the_bytes_of_four_bits_and_scales(name):
    form = KNOWN[name]
    sizes = {part.name: part.nbytes for part in form.parts(128, 64, Scheme(4, 16))}
    assert sizes[form.words or "weight"] == 64 * 128 // 2
    assert sizes["weight_scale"] == 64 * 128 // form.unit[0]


def test_scales_of_other_groups_are_refused():
    parts, _wanted = vector("ct_nvfp4_out8_in64")
    parts["weight_scale"] = parts["weight_scale"][:, :2]
    with pytest.raises(BadCheckpoint, match="groups of 16"):
        KNOWN["nvfp4-pack-quantized"].unpack(parts, Scheme(4, 16))


def test_exponent_255_is_nan_and_127_is_one():
    assert powers(np.array([[127, 128, 126, 0]], np.uint8)).tolist() == [[1.0, 2.0, 0.5, 2.0**-127]]
    assert np.isnan(powers(np.array([[255]], np.uint8))).all()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_fused_experts_decode_as_in_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(5)
    blocks, scales = rng.integers(0, 256, (3, 6, 4, 16), np.uint8), rng.integers(118, 136, (3, 6, 4), np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(unpack_experts(blocks, scales), theirs.transpose(1, 2).numpy())
