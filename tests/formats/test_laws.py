"""What holds for every format of affine grids that is written: NumPy and torch make the same words, parts() says what
pack() makes, a config says what was asked for, and a linear reads back row by row.
"""

import numpy as np
import pytest
import torch

from doctor.core.recipe import FORMATS, Recipe, Scheme
from doctor.formats.grid import Grid
from doctor.formats.known import is_scale_beside_weight, packed_tails, says_packed, shows_packing
from doctor.formats.registry import KNOWN, format_of, format_of_words, read_quantization, scale_tails, word_tails

N, K = 64, 96
TORCH = {"I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "U8": torch.uint8, "F32": torch.float32}


AFFINE = {
    name: form for name, form in FORMATS.items() if not form.groups and not form.in_blocks
}  # others: test_compressed_floats.py


def schemes():
    for name, form in AFFINE.items():
        for bits in form.bits:
            for group in (32, -1):
                for sym in (True, False):
                    yield pytest.param(KNOWN[name], Scheme(bits, group, sym), id=f"{name}-{bits}-{group}-{sym}")


EVERY_SCHEME = list(schemes())


def linear(scheme):
    """codes u8[n, k] and their grid, as torch has them."""
    rng = np.random.default_rng(scheme.bits)
    groups = 1 if scheme.group_size == -1 else K // scheme.group_size
    codes = rng.integers(0, 1 << scheme.bits, (N, K), np.uint8)
    zero = rng.integers(1, 1 << scheme.bits, (N, groups), np.int32)
    if scheme.sym:
        zero[:] = 1 << (scheme.bits - 1)
    scale = rng.uniform(0.01, 0.02, (N, groups)).astype(np.float16).astype(np.float32)
    return torch.from_numpy(codes), Grid(torch.from_numpy(scale), torch.from_numpy(zero))


def in_numpy(parts):
    return {name: tensor.numpy() for name, tensor in parts.items()}


@pytest.mark.parametrize("form, scheme", EVERY_SCHEME)
def test_numpy_and_torch_pack_the_same_bytes(form, scheme):
    codes, grid = linear(scheme)
    made = form.pack(codes, grid, None, scheme)
    again = form.pack(codes.numpy(), Grid(grid.scale.numpy(), grid.zero.numpy()), None, scheme)
    assert made.keys() == again.keys()
    for name, tensor in made.items():
        assert again[name].dtype == tensor.numpy().dtype and again[name].tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("form, scheme", EVERY_SCHEME)
def test_numpy_and_torch_read_the_same_weights_whole_and_by_rows(form, scheme):
    codes, grid = linear(scheme)
    parts = form.pack(codes, grid, None, scheme)
    width = K // grid.scale.shape[1]
    want = ((codes.float() - grid.zero.repeat_interleave(width, 1)) * grid.scale.repeat_interleave(width, 1)).numpy()
    assert (form.unpack(parts, scheme, (N, K)).numpy() == want).all()
    assert (form.unpack(in_numpy(parts), scheme, (N, K)) == want).all()
    for begin, end in ((0, 5), (5, 7), (7, 40), (40, N)):
        assert (form.unpack(in_numpy(parts), scheme, (N, K), slice(begin, end)) == want[begin:end]).all()
        assert (form.unpack(parts, scheme, (N, K), slice(begin, end)).numpy() == want[begin:end]).all()


@pytest.mark.parametrize("form, scheme", EVERY_SCHEME)
def test_parts_say_what_pack_makes_and_how_large_it_is(form, scheme):
    codes, grid = linear(scheme)
    made = form.pack(codes, grid, None, scheme)
    parts = form.parts(K, N, scheme)
    assert {(p.name, p.shape, TORCH[p.dtype]) for p in parts} == {(n, tuple(t.shape), t.dtype) for n, t in made.items()}
    assert form.bytes(K, N, scheme) == sum(t.numel() * t.element_size() for t in made.values())
    assert {p.name for p in parts} <= set(form.part_names) and form.words in made and set(form.needed) <= made.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    assert form.size(shapes[form.words], scheme.bits) == (K, N)
    assert form.weight_shape(shapes, made.__getitem__, scheme.bits) == (N, K)
    group = K if scheme.group_size == -1 else scheme.group_size
    assert form.scale_shape(K, N, group) == shapes[form.scales]


@pytest.mark.parametrize("form, scheme", EVERY_SCHEME)
def test_a_config_reads_back_as_what_it_was_written_for(form, scheme):
    recipe = Recipe("rtn", scheme.bits, scheme.group_size, scheme.sym, format=form.name)
    stated = form.config(recipe)
    assert says_packed(stated)
    found = read_quantization(stated, "config.json", "/quantization_config")
    assert (found.format, found.scheme, found.desc_act, found.readable) == (form, scheme, False, True)
    assert format_of(recipe) is form and [f for f in KNOWN.values() if f.claims(stated)] == [found.reader]


@pytest.mark.parametrize("name", AFFINE)
def test_what_stays_in_16_bits_is_excluded_by_the_config_and_nothing_else(name):
    form = KNOWN[name]
    out = form.excluded(form.config(Recipe("rtn", format=name), ["model.layers.0.mlp.down_proj"]))
    assert out("model.layers.0.mlp.down_proj") and out("lm_head")
    assert not out("model.layers.1.mlp.down_proj") and not out("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("name", [n for n, form in AFFINE.items() if form.own_widths])
def test_widths_of_single_linears_read_back(name):
    recipe = Recipe("rtn", 4, 32, format=name, bits_for=("*.1.*=8",))
    stated = KNOWN[name].config(recipe, widths={"model.layers.1.mlp.down_proj": 8})
    found = read_quantization(stated, "config.json", "")
    assert (found.bits, found.bits_of("model.layers.1.mlp.down_proj"), found.bits_of("model.layers.1.mlp.up_proj")) == (
        4,
        8,
        4,
    )
    assert found.scheme_of("model.layers.1.mlp.down_proj") == Scheme(8, 32, True)
    assert read_quantization(stated, "config.json", "", own=False).bits_of("model.layers.1.mlp.down_proj") == 4


def test_modules_are_excluded_as_each_program_names_them():
    gptq = KNOWN["gptq"].excluded({"dynamic": {r"-:.*\.gate$": {}, r"+:.*\.up$": {"bits": 8}}, "lm_head": True})
    assert gptq("model.layers.0.mlp.gate") and not gptq("model.layers.0.mlp.up") and not gptq("lm_head")
    awq = KNOWN["awq"].excluded({"modules_to_not_convert": ["gate", "visual"]})
    assert awq("model.layers.0.mlp.gate_proj") and awq("visual.blocks.0") and not awq("lm_head")
    assert not KNOWN["awq"].excluded({"modules_to_not_convert": None})("lm_head")
    ct = KNOWN["compressed-tensors"].excluded({"ignore": ["lm_head", r"re:.*\.experts\.", "LlamaRMSNorm"]})
    assert ct("lm_head") and ct("model.layers.0.mlp.experts.3.up_proj") and not ct("model.layers.0.mlp.up_proj")


def test_sizes_that_do_not_fit_are_named():
    form = KNOWN["gptq"]
    assert form.unfit(Scheme(4, 32), 96, 64) == form.unfit(Scheme(4, -1), 96, 64) == ""
    assert form.unfit(Scheme(4, 64), 96, 64) == "in_features 96 is not a multiple of group_size 64"
    assert form.unfit(Scheme(4, -1), 100, 64) == "[64, 100]: packing needs multiples of 32"


def test_names_tell_packed_weights_of_formats_that_are_not_read_too():
    assert set(word_tails()) == {".qweight", ".weight_packed"} and set(packed_tails()) == {
        *word_tails(),
        ".q_weight",
        ".trellis",
    }
    assert set(scale_tails()) == {".scales", ".q_scale", ".weight_scale", ".weight_scale_inv"}
    assert format_of_words("a.qweight").name == "gptq" and format_of_words("a.weight") is None
    assert shows_packing("a.trellis") and shows_packing("a.qweight") and not shows_packing("a.weight")
    assert is_scale_beside_weight("a.SCB") and is_scale_beside_weight("a.weight.quant_state.bitsandbytes__nf4")
    for method in ("gptq", "awq", "fp8", "auto-round", "exl2", "aqlm"):
        assert says_packed({"quant_method": method})
    for raw in (
        {"quant_method": "bitsandbytes"},  # a loader is to quantize
        {"quant_method": "compressed-tensors"},  # a cache alone
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}, "format": "dense"},
        {"quant_method": "nobody's"},
    ):
        assert not says_packed(raw)


@pytest.mark.parametrize("scale, tile", [((1,), ()), ((N, 1), ()), ((2, 2), (32, 64)), ((2, 2), ())])
def test_fp8_reads_the_same_in_numpy_and_torch(scale, tile):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 0x7F, (N, K), np.uint8)
    factor = rng.uniform(1e-4, 1e-3, scale).astype(np.float32)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    scheme = Scheme(8, tile=tile)
    got = KNOWN["fp8"].unpack({"weight": weight, "weight_scale_inv": torch.from_numpy(factor)}, scheme).numpy()
    same = KNOWN["fp8"].unpack({"weight": weight.float().numpy(), "weight_scale": factor}, scheme)
    rows, columns = tile or (-(-N // factor.shape[0]), -(-K // factor.shape[-1]))
    wide = factor if len(scale) == 1 else factor.repeat(rows, 0)[:N].repeat(columns, 1)[:, :K]
    assert (got == same).all() and (got == weight.float().numpy() * wide).all()
    part = KNOWN["fp8"].unpack({"weight": weight.float().numpy(), "weight_scale": factor}, scheme, rows=slice(30, 40))
    assert (part == got[30:40]).all()


def test_a_format_that_stores_zero_points_anyway_gets_an_asymmetric_grid_unasked():
    assert {form.name for form in FORMATS.values() if form.stores_zeros} == {"awq"}
    assert Recipe("gptq", format="awq").sym is False and Recipe("awq").sym is False
    assert Recipe("gptq").sym is True and Recipe("gptq", format="compressed-tensors").sym is True
    assert Recipe("gptq", format="awq", sym=True).sym is True  # what is asked for stays
    below = {form.name for form in FORMATS.values() if form.zeros_are_free(3)}
    assert below == {"awq", "gptq", "gptq_v2"}, "no kernel of symmetric codes alone reads GPTQ below 4 bits"
    assert Recipe(bits=3).sym is False and Recipe("rtn", bits=2, format="gptq_v2").sym is False
    assert Recipe(bits=3, sym=True).sym is True and Recipe(bits=3, format="compressed-tensors").sym is True
    assert Recipe(bits=8).sym is True


def test_symmetric_grids_below_4_bits_may_turn_a_group_round():
    signed = {
        (form.name, bits)
        for form in FORMATS.values()
        for bits in (2, 3, 4, 8)
        if bits in form.bits and form.grid(Scheme(bits, 64)).signed
    }
    assert signed == {(name, bits) for name in ("gptq", "gptq_v2", "compressed-tensors") for bits in (2, 3)}
    assert not FORMATS["gptq"].grid(Scheme(3, 64, sym=False)).signed
