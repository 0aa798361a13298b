"""EXL2 and EXL3: bytes decode to the numbers of ExLlama's own code, compiled for a processor."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.recipe import Recipe, Scheme
from doctor.edits.decoding import decoded
from doctor.formats.bits import pack_columns, pack_rows
from doctor.formats.exl2 import groups_of
from doctor.formats.exl3 import codebook, tile_order, tile_values
from doctor.formats.registry import KNOWN
from doctor.lint.testing import tiny
from doctor.quant.dequantize import as_float

VECTORS = Path(__file__).parents[2] / "fixtures" / "vectors"


def vector(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def of_hex(text, kind=np.float16):
    """Values of bit patterns, each of as many digits as its width has."""
    width = np.dtype(kind).itemsize * 2
    digits = "".join(text.split()) if isinstance(text, str) else "".join(text)
    patterns = [int(digits[at : at + width], 16) for at in range(0, len(digits), width)]
    return np.array(patterns, f"u{width // 2}").view(kind)


def parts_of(tensors):
    """The tensors of a vector as readers get them: integers as stored, floats as float32."""
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor["shape"])
        if tensor["dtype"] == "F16":
            found[name] = of_hex(tensor["hex"]).astype(np.float32).reshape(shape)
        elif "u16_hex" in tensor:
            found[name] = of_hex(tensor["u16_hex"], np.uint16).view(np.int16).reshape(shape)
        else:
            kind = {"I16": np.int16, "I32": np.int32}[tensor["dtype"]]
            found[name] = np.array(tensor.get("data", tensor.get("value")), kind).reshape(shape)
    return found


@pytest.mark.parametrize("name", ["exl2_dequant_in160_out32_6_4_3_2", "exl2_dequant_in96_out40_pad64_bias"])
def test_exl2_decodes_to_the_reference_kernels_numbers_bit_for_bit(name):
    known, form = vector(name), KNOWN["exl2"]
    parts = parts_of(known["tensors"])
    k, n = known["in_features"], known["padded_out"]
    wanted = of_hex(known["weight_in_out_f16_hex"]).astype(np.float32).reshape(k, n).T
    assert np.array_equal(form.unpack(parts, Scheme(4), (n, k)), wanted)
    assert np.array_equal(form.unpack(parts, Scheme(4), (n, k), slice(5, 19)), wanted[5:19])
    plan = [tuple(pair) for pair in known["plan_bits_rows"]]
    assert [(g.bits, g.channels) for g in groups_of(parts["q_groups"], len(parts["q_weight"]))] == plan
    without = {part: values for part, values in parts.items() if part != "q_invperm"}
    swapped = {**without, "q_perm": np.argsort(parts["q_invperm"])}
    assert np.array_equal(form.unpack(swapped, Scheme(4), (n, k)), wanted)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q_invperm": np.zeros(96, np.int32)}, "must be a permutation"),
        ({"q_groups": np.array([4, 0, 8, 4, 5, 12], np.int16)}, "group 1 has 8 bits after one of 4"),
        ({"q_groups": np.array([7, 0, 5, 8, 4, 13], np.int16)}, "group 0 has 7 bits"),
        ({"q_groups": np.array([8, 0, 5, 8, 4, 8], np.int16)}, "group 1 has 0 rows"),
        ({"q_groups": np.array([8, 1, 5, 8, 4, 13], np.int16)}, "group 0 begins at row 1"),
        ({"q_scale_max": np.ones(2, np.float32)}, "q_scale_max"),
        ({"q_invperm": np.arange(128, dtype=np.int32)}, "the groups hold 96 input channels; q_invperm has 128"),
    ],
)
def test_exl2_groups_that_kernels_would_compute_wrongly_are_refused_by_number(change, text):
    parts = parts_of(vector("exl2_dequant_in96_out40_pad64_bias")["tensors"])
    with pytest.raises(BadCheckpoint, match=text):
        KNOWN["exl2"].unpack({**parts, **change}, Scheme(4))


@pytest.mark.parametrize("name", ["3inst", "mcg", "mul1"])
def test_every_state_of_a_codebook_has_the_references_number(name):
    known = vector("exl3_codebooks")["codebooks"][name]
    digest = hashlib.sha256(codebook(name).astype("<f2").tobytes()).hexdigest()
    assert digest == known["sha256_of_65536_float16_little_endian"]


def test_tiles_of_every_width_and_codebook_decode_bit_for_bit():
    known = vector("exl3_tiles")
    assert tile_order().tolist() == known["tile_order"] and len(known["tiles"]) == 19
    for tile in known["tiles"]:
        packed = of_hex(tile["packed_u16_hex"], np.uint16).reshape(1, 1, -1)
        wanted = of_hex(tile["tile_f16_hex_row_major"]).reshape(16, 16)
        found = tile_values(packed, tile["codebook"])
        assert np.array_equal(found.view(np.uint16), wanted.view(np.uint16)), (tile["codebook"], tile["bits"])


def test_a_whole_exl3_weight_is_that_of_the_transforms_in_float64():
    known, form = vector("exl3_in128_out256_2bit_mul1"), KNOWN["exl3"]
    parts = parts_of(known["tensors"])
    W = form.unpack(parts, Scheme(2))
    assert W.shape == (256, 128)
    for row, text in known["weight_in_out_f32_rows"].items():
        wanted = of_hex(text, np.float32)
        assert np.abs(W[:, int(row)] - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert float(np.linalg.norm(W.astype(np.float64))) == pytest.approx(known["weight_frobenius"], rel=1e-6)
    assert np.array_equal(form.unpack(parts, Scheme(2), None, slice(100, 140)), W[100:140])


def exl2_linear(rng, n, k):
    """Tensors of a random EXL2 linear in 6, 4 and 2 bits; k is 64 or 128."""
    plan = [(6, 32), (4, k - 32)] if k == 64 else [(6, 32), (4, k - 64), (2, 32)]
    words, pairs = [], []
    for bits, channels in plan:
        pairs += [bits, sum(map(len, words))]
        words.append(pack_columns(rng.integers(0, 2**bits, (channels, n), dtype=np.uint8), bits))
    roots = rng.integers(0, 16, (len(plan), n), dtype=np.uint8)
    return {
        "q_weight": ("I32", np.concatenate(words)),
        "q_scale": ("I32", pack_rows(roots, 4)),
        "q_scale_max": ("F16", np.full(len(plan), 0.02, np.float16).view(np.uint16)),
        "q_groups": ("I16", np.array(pairs, np.int16)),
        "q_invperm": ("I32", rng.permutation(k).astype(np.int32)),
    }


def exl3_linear(rng, n, k):
    """Tensors of a random EXL3 linear of 3 bits."""
    n, k = (-(-size // 128) * 128 for size in (n, k))
    sides = {name: (rng.choice([-0.02, 0.02], size)).astype(np.float16) for name, size in (("suh", k), ("svh", n))}
    return {
        "trellis": ("I16", rng.integers(-(2**15), 2**15, (k // 16, n // 16, 48)).astype(np.int16)),
        **{name: ("F16", values.view(np.uint16)) for name, values in sides.items()},
        "mul1": ("I32", np.array(0x83DCD12D - 2**32, np.int32)),
    }


def packed(kind, make, **sizes):
    """A tiny model whose linears are of this format, and the weights that they stand for."""
    case, rng = tiny("llama", **sizes), np.random.default_rng(0)
    case.config["quantization_config"] = {"quant_method": kind, "version": "0.3.2", "bits": 4.2, "head_bits": 6}
    weights = {}
    for name in [n for n in case.tensors if n.endswith("_proj.weight")]:
        n, k = case.tensors.pop(name).shape
        case.dtypes.pop(name, None)
        parts = {}
        for part, (dtype, values) in make(rng, n, k).items():
            case.tensors[f"{name.removesuffix('weight')}{part}"] = values
            case.dtypes[f"{name.removesuffix('weight')}{part}"] = dtype
            parts[part] = values.view(np.float16).astype(np.float32) if dtype == "F16" else values
        weights[name] = KNOWN[kind].unpack(parts, Scheme(4))
    return case, weights


@pytest.mark.parametrize(("kind", "make"), [("exl2", exl2_linear), ("exl3", exl3_linear)])
def test_a_whole_checkpoint_is_checked_read_and_compared(tmp_path, kind, make):
    case, weights = packed(kind, make)
    folder = case.write(tmp_path / kind)
    report = api.check(folder)
    assert not [f.message for f in report.findings if f.severity == "error"]
    found, how = decoded(Checkpoint.open(folder))
    assert how.label == KNOWN[kind].label and len(how.stored) == 14
    view = as_float(Checkpoint.open(folder))
    for name, W in weights.items():
        n, k = tiny("llama").tensors[name].shape
        assert found.tensors[name].shape == (n, k)
        kept = view.load(name)
        assert np.array_equal(kept, found.load(name))
        read = (kept.astype(np.uint32) << 16).view(np.float32)  # bfloat16, as the embedding
        assert np.abs(read - W[:n, :k]).max() <= np.abs(W).max() / 128


def test_a_linear_whose_parts_do_not_fit_is_named(tmp_path):
    case, _weights = packed("exl2", exl2_linear)
    name = next(n for n in case.tensors if n.endswith("down_proj.q_invperm"))
    case.tensors[name] = np.zeros_like(case.tensors[name])
    view = as_float(Checkpoint.open(case.write(tmp_path / "m")))
    with pytest.raises(Exception, match=r"down_proj: q_invperm .*permutation"):
        view.load(name.replace("q_invperm", "weight"))


def test_a_checkpoint_is_decoded_by_convert_and_quantized_from(tmp_path):
    case, weights = packed("exl2", exl2_linear)
    folder = case.write(tmp_path / "m")
    plain = api.convert(folder, tmp_path / "plain", "bf16", client=None).output
    read = Checkpoint.open(plain)
    assert "quantization_config" not in read.value("config.json")
    for name, W in weights.items():
        kept = (read.load(name).astype(np.uint32) << 16).view(np.float32)
        assert np.abs(kept - W).max() <= np.abs(W).max() / 128
    recipe = Recipe(method="rtn", bits=8, group_size=-1, format="float-quantized", activations="fp8")
    found = api.quantize(folder, tmp_path / "fp8", recipe, client=None)
    assert found.output, [f.message for f in found.report.findings]
    assert not [n for n in Checkpoint.open(found.output).tensors if "q_" in n.rpartition(".")[2]]
