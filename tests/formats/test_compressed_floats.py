"""FP8, INT8, NVFP4, MXFP4 and MXFP8 as compressed-tensors has them: its configuration class accepts what is written,
its compressors make the same bytes from the same scales, and its decompressors give the weights that were meant.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.e2m1 import packed_halves
from doctor.formats.grid import Grid
from doctor.formats.mxfp4 import exponents, powers
from doctor.formats.registry import KNOWN, format_of
from doctor.formats.schemes import SCHEMES, fields_of
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.linear import Solved, divisors, pack_linear, solve_linear
from doctor.quant.solve.float_scale import power_of
from doctor.quant.solve.hessian import Hessian

compressed_tensors = pytest.importorskip("compressed_tensors")

PRESETS = json.loads((Path(__file__).parents[2] / "fixtures" / "vectors" / "ct_configs.json").read_text())["configs"]
OURS = {"INT8": "W8A8", "FP8_STATIC": "FP8"}  # our name -> the preset's
NAMES = [name for name in SCHEMES if OURS.get(name, name) in PRESETS]
FLOATS = [name for name in NAMES if not name.startswith("W")]
PREFIX = "model.layers.0.mlp.up_proj"


def recipe_of(name, **given):
    return Recipe(**fields_of(name, given))


def linear(n, k, name=PREFIX):
    from doctor.model.linears import Linear

    return Linear(name, f"{name}.weight", "up", 0, k, n)


def module(n=256, k=384, seed=0):
    made = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(seed)
    W = torch.randn(n, k, generator=rng) * torch.rand(n, 1, generator=rng) * 0.1
    W[3], W[:, 5] = 0, 0  # a row of zeros, a column of zeros
    made.weight.data = W.to(torch.bfloat16)
    return made


def quantized(name, made):
    """(parts by their last names, W f32 that was meant)."""
    recipe = recipe_of(name, method="rtn") if "rtn" in SCHEMES[name].methods else recipe_of(name)
    own = linear(*made.weight.shape)
    scaled = divisors({own.name: (own, made)}, recipe).get(own.name, 1.0)
    given = None
    if recipe.scheme.inputs:
        inputs = Hessian(made.in_features)
        inputs.add(torch.randn(64, made.in_features, generator=torch.Generator().manual_seed(7)))
        given = LayerInput(inputs, Recipe())
    solved = solve_linear(own, made, given, recipe, divisor=scaled)
    assert isinstance(solved, Solved) and solved.solution is not None, solved.failure
    packed = pack_linear(own, solved, recipe, scaled, given)
    return {part.rpartition(".")[2]: t for part, t in packed.parts.items()}, packed.weight(), recipe


def compressor(recipe):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    form = format_of(recipe)
    stated = QuantizationConfig.model_validate(form.config(recipe))
    return BaseCompressor.get_value_from_registry(form.layout), stated.config_groups["group_0"]


@pytest.mark.parametrize("name", NAMES)
def test_a_config_group_is_the_preset_of_the_library(name):
    recipe = recipe_of(name)
    ours = format_of(recipe).config(recipe)["config_groups"]["group_0"]
    preset = PRESETS[OURS.get(name, name)]["config_groups"]["group_0"]
    ours["weights"] = {k: v for k, v in ours["weights"].items() if k not in ("actorder", "observer")}
    if name == "FP8_STATIC":  # a scale a row, which vLLM reads too and does not round again where it joins q, k and v
        assert ours["weights"].pop("strategy") == "channel" and preset["weights"].pop("strategy") == "tensor"
    assert ours == preset
    compressor(recipe)  # the library's own class takes it


@pytest.mark.parametrize("name", FLOATS)
def test_the_library_makes_the_same_bytes_from_the_same_scales(name):
    """But for zeros of negative weights, which it writes as minus zero."""
    made = module()
    parts, _weight, recipe = quantized(name, made)
    library, scheme = compressor(recipe)
    scale = parts["weight_scale"]
    state = {"weight": made.weight.data.float(), **{k: v for k, v in parts.items() if k == "weight_global_scale"}}
    state["weight_scale"] = powers(scale) if scale.dtype == torch.uint8 else scale.float()
    theirs = library.compress(state, scheme)
    assert theirs["weight_scale"].to(scale.dtype).view(torch.uint8).equal(scale.view(torch.uint8))
    word = next(part for part in ("weight_packed", "weight") if part in parts)
    ours, made_there = parts[word].view(torch.uint8), theirs[word].view(torch.uint8)
    if word == "weight_packed":
        low, high = made_there & 15, made_there >> 4
        made_there = torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)
    assert ours.shape == made_there.shape
    different = int((ours != made_there).sum())
    assert different == 0, f"{different} of {ours.numel()} bytes differ"


@pytest.mark.parametrize("name", FLOATS)
def test_the_library_reads_the_weights_that_were_meant(name):
    parts, weight, recipe = quantized(name, module())
    library, scheme = compressor(recipe)
    read = library.decompress(parts, scheme)["weight"]
    assert read.dtype == torch.bfloat16 and torch.equal(read, weight.to(torch.bfloat16))
    form = format_of(recipe)
    assert torch.equal(form.unpack(parts, recipe.scheme, tuple(weight.shape)), weight)
    codes = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
    codes["BF16"] = torch.bfloat16
    wanted = form.parts(weight.shape[1], weight.shape[0], recipe.scheme)
    assert {(p.name, p.shape, codes[p.dtype]) for p in wanted} == {
        (n, tuple(t.shape), t.dtype) for n, t in parts.items()
    }
    assert form.weight_shape({n: tuple(t.shape) for n, t in parts.items()}, parts.__getitem__, 4) == (256, 384)
    in_numpy = {
        n: t.float().numpy() if t.dtype not in (torch.uint8, torch.int8) else t.numpy() for n, t in parts.items()
    }
    for rows in (slice(0, 5), slice(130, 256)):
        assert (form.unpack(in_numpy, recipe.scheme, (256, 384), rows) == weight[rows].numpy()).all()


@pytest.mark.parametrize("name", ["MXFP4A16", "MXFP8A16"])
def test_a_group_is_scaled_by_the_power_of_two_that_the_library_chooses(name):
    from compressed_tensors.quantization.utils import calculate_qparams

    _library, scheme = compressor(recipe_of(name))
    spans = torch.tensor([1.0, 1.4, 1.7499, 1.75, 1.9, 3.5, 3.49, 1e-3, 1e-6, 300.0])
    theirs, _zero = calculate_qparams(-spans, spans, scheme.weights)
    assert torch.equal(power_of(spans) / (4 if name == "MXFP4A16" else 256), theirs.float())


def test_inputs_are_scaled_by_their_largest_value():
    inputs = Hessian(384)
    for scale in (0.5, 2.0, 1.0):
        inputs.add(torch.randn(5, 384, generator=torch.Generator().manual_seed(int(scale * 2))) * scale)
    largest = LayerInput(inputs, Recipe()).largest
    parts = KNOWN["float-quantized"].input_parts(recipe_of("FP8_STATIC"), largest)
    assert float(parts["input_scale"]) == pytest.approx(largest / 448, rel=4e-3)
    parts = KNOWN["nvfp4-pack-quantized"].input_parts(recipe_of("NVFP4"), largest)
    assert float(parts["input_global_scale"]) == pytest.approx(448 * 6 / largest)
    assert KNOWN["float-quantized"].input_parts(recipe_of("FP8_DYNAMIC"), largest) == {}


def test_a_linear_that_no_row_reached_has_no_scale_of_its_inputs():
    own, recipe = linear(256, 384), recipe_of("FP8_STATIC")
    with pytest.raises(NotQuantizable, match="no calibration row reached it"):
        pack_linear(own, solve_linear(own, module(), None, recipe), recipe)


def test_linears_that_an_engine_joins_share_their_divisor():
    made = {f"model.layers.0.self_attn.{r}_proj": module(32, 64, seed) for seed, r in enumerate("qkv")}
    pairs = {name: (linear(32, 64, name)._replace(role=name[-6]), m) for name, m in made.items()}
    found = divisors(pairs, recipe_of("NVFP4A16"))
    most = max(float(m.weight.detach().abs().max()) for m in made.values())
    assert set(found.values()) == {float(np.float32(2688) / np.float32(most))}
    assert divisors(pairs, recipe_of("MXFP4A16")) == {}


def test_what_no_format_can_hold_is_refused_by_name():
    with pytest.raises(NotQuantizable, match="no power of two"):
        exponents(torch.tensor([[0.75]]))
    with pytest.raises(NotQuantizable, match="no value of a 4-bit float"):
        packed_halves(torch.tensor([[12, 17]], dtype=torch.uint8))
    grid = Grid(torch.full((1, 1), 0.3), torch.full((1, 1), 12), divisor=torch.tensor([7.0]))
    with pytest.raises(NotQuantizable, match="no 8-bit float under its divisor"):
        KNOWN["nvfp4-pack-quantized"].pack(torch.full((1, 16), 12, dtype=torch.uint8), grid, None, Scheme(4, 16))
    assert KNOWN["float-quantized"].unfit(Scheme(8, 128), 576, 576) == (
        "[576, 576]: tiles of 128 × 128 need multiples of 128"
    )
    assert KNOWN["float-quantized"].unfit(Scheme(8, -1), 577, 31) == ""


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("NVFP5", {}, r"scheme 'NVFP5' is not known.*Did you mean NVFP4"),
        ("W4A16", {"bits": 8}, r"--scheme W4A16 with --bits 8: the scheme has 4 there"),
        ("fp8-dynamic", {"method": "gptq"}, r"--scheme FP8_DYNAMIC with --for gptq: the scheme has rtn there"),
        ("MXFP4", {"method": "awq"}, r"the scheme has one of gptq, rtn there"),
        ("INT8", {"group_size": 128}, r"--group-size 128: the scheme has -1 there"),
    ],
)
def test_a_name_that_is_unknown_or_contradicted_is_refused(name, given, message):
    with pytest.raises(DoctorError) as error:
        fields_of(name, given)
    assert re.search(message, f"{error.value.message} {error.value.hint}")


def test_a_scheme_leaves_groups_open_where_its_name_does():
    assert fields_of("w4a16", {"group_size": 64})["group_size"] == 64
    assert Recipe(**fields_of("W8A8", {})).output_format == "int-quantized"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "nvfp4-pack-quantized", "bits": 4, "group_size": 128}, "group size 128 .* must be one of 16"),
        (
            {"format": "mxfp4-pack-quantized", "method": "awq", "group_size": 32},
            "method awq .* must be one of gptq, rtn",
        ),
        ({"format": "gptq", "activations": "fp8"}, "16-bit activations"),
        ({"format": "compressed-tensors", "activations": "fp4"}, "must be one of fp8"),
        ({"format": "mxfp4-pack-quantized", "group_size": 32, "sym": False}, "asymmetric grid"),
        ({"format": "float-quantized", "group_size": -1, "bits": 4, "method": "rtn"}, "with 4 bits"),
    ],
)
def test_a_recipe_that_no_format_can_follow_is_refused(fields, message):
    with pytest.raises(DoctorError, match=message):
        Recipe(**fields)
