"""Blocks of GGUF's types decode to the values of other programs' own vectors, bit for bit."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from doctor.checkpoint.ggml_types import BY_NAME
from doctor.core.errors import BadCheckpoint
from doctor.formats.ggml_blocks import can_decode, decode

VECTOR = json.loads((Path(__file__).parents[2] / "fixtures" / "vectors" / "gguf_blocks.json").read_text())
CASES = [(name, case) for name, kind in VECTOR["types"].items() for case in kind["cases"]]
OF_THE_LIBRARY = {"IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "NVFP4", "TQ1_0", "TQ2_0"}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_blocks_decode_to_what_the_reference_computes(name, case):
    if name in OF_THE_LIBRARY and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")
    stated, kind = VECTOR["types"][name], BY_NAME[name]
    assert (kind.number, kind.block, kind.nbytes) == (stated["number"], stated["block"], stated["bytes"])
    raw = np.frombuffer(bytes.fromhex(stated["cases"][case]["hex"]), np.uint8).reshape(2, -1)
    values = decode(raw, kind, 256)
    assert values.shape == (2, 256)
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == stated["cases"][case]["decoded_sha256"]


def test_plain_types_are_taken_as_they_are():
    values = np.array([[1.5, -2.0, 0.0, 3.25]], np.float32)
    assert np.array_equal(decode(values.view(np.uint8), BY_NAME["F32"], 4), values)
    assert np.array_equal(decode(values.astype("<f2").view(np.uint8), BY_NAME["F16"], 4), values)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    assert np.array_equal(decode(halves.view(np.uint8), BY_NAME["BF16"], 4), values)


def test_a_type_that_nobody_decodes_is_named():
    assert not can_decode(BY_NAME["Q8_K"])
    with pytest.raises(BadCheckpoint, match="Q8_K"):
        decode(np.zeros((1, 292), np.uint8), BY_NAME["Q8_K"], 256)
