"""EXL2 as it is written: what the reader, which is proved on the reference's kernels, makes of it."""

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.options import overrides
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.recipe import Recipe, Scheme
from doctor.core.widths import split_width, widths_from
from doctor.formats.exl2 import broken_groups, groups_of
from doctor.formats.grid import Grid, group_bits, squared_scale
from doctor.formats.registry import KNOWN
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.quant.allocation import saved
from doctor.quant.allocation.budget import Budget
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.solve import cpu, gptq
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.rtn import round_to_nearest
from doctor.quant.solve.square import Square
from doctor.quant.solve.squared_scale import snapped
from tests.helpers.gguf_models import rows

FORM = KNOWN["exl2"]
EVERY = pytest.mark.parametrize("bits", FORM.bits)


WIDTHS = widths_from(FORM.bits, FORM.wide)


def linear(n, k, bits, group, seed=0):
    """Random codes u8[n, k] on squared scales."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(1e-5, 1e-3, k // group).astype(np.float16).astype(np.float32)
    roots = rng.integers(1, 17, (n, k // group)).astype(np.float32)
    zero = np.full((n, k // group), 1 << (bits - 1), np.int32)
    return rng.integers(0, 1 << bits, (n, k), np.uint8), Grid(squared_scale(roots, base), zero, "", base)


def values(codes, grid, bits, owner):
    """What the format's description says, in float16 products."""
    levels = codes.astype(np.float16) - np.float16(1 << (bits - 1))
    return (levels * grid.scale[:, owner].astype(np.float16)).astype(np.float32)


@EVERY
@pytest.mark.parametrize(("n", "group", "scattered"), [(64, 32, False), (40, 64, False), (64, 32, True)])
def test_what_is_packed_reads_back_bit_for_bit(bits, n, group, scattered):
    codes, grid = linear(n, 128, bits, group)
    owner = np.arange(128) // group
    if scattered:
        owner = np.random.default_rng(1).permutation(owner)
    scheme = Scheme(bits, group)
    made = FORM.pack(codes, grid, owner.astype(np.int32), scheme)
    read = FORM.unpack({**made, "q_scale_max": made["q_scale_max"].astype(np.float32)}, scheme, (n, 128))
    assert np.array_equal(read, values(codes, grid, bits, owner))
    groups = groups_of(made["q_groups"], len(made["q_weight"]))
    assert not list(broken_groups(groups)) and {g.bits for g in groups} == {bits}
    assert {p.name: p.shape for p in FORM.parts(128, n, scheme)} == {name: x.shape for name, x in made.items()}
    assert FORM.bytes(128, n, scheme) == sum(x.nbytes for x in made.values())


@pytest.mark.parametrize("width", [w for w in WIDTHS if w % 1])
@pytest.mark.parametrize("n", [40, 64])
def test_widths_inside_one_matrix_read_back_bit_for_bit(width, n):
    scheme, groups = Scheme(group_size=32, **split_width(width)), 8
    widths = np.array(group_bits(scheme.bits, scheme.wide, groups))
    _, grid = linear(n, 256, scheme.bits, 32)
    grid = grid._replace(zero=np.tile(1 << (widths - 1), (n, 1)).astype(np.int32))
    rng = np.random.default_rng(2)
    owner = rng.permutation(np.arange(256) // 32)
    codes = (rng.integers(0, 256, (n, 256)) % (1 << widths[owner])).astype(np.uint8)
    made = FORM.pack(codes, grid, owner.astype(np.int32), scheme)
    read = FORM.unpack(made, scheme, (n, 256))
    levels = codes.astype(np.float16) - grid.zero[0, owner].astype(np.float16)
    assert np.array_equal(read, (levels * grid.scale[:, owner].astype(np.float16)).astype(np.float32))
    found = groups_of(made["q_groups"], len(made["q_weight"]))
    assert not list(broken_groups(found)) and [g.bits for g in found] == list(widths)
    assert sum(widths > scheme.bits) == {10: 1, 25: 2}[scheme.wide]
    assert {p.name: p.shape for p in FORM.parts(256, n, scheme)} == {name: x.shape for name, x in made.items()}
    # ExLlamaV2's own count: codes, then 16 + 32 bits and 4 an output for each group, then 32 an input
    padded = -(-n // 32) * 32
    assert 8 * FORM.bytes(256, n, scheme) == int(sum(widths)) * 32 * padded + groups * (48 + 4 * padded) + 32 * 256
    with pytest.raises(NotQuantizable, match="needs symmetric groups"):
        FORM.pack(codes, grid, owner.astype(np.int32), Scheme(scheme.bits, 32))


def test_torch_and_numpy_pack_the_same_bytes():
    codes, grid = linear(48, 96, 5, 32)
    ours = FORM.pack(codes, grid, None, Scheme(5, 32))
    tensors = Grid(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in grid))
    theirs = FORM.pack(torch.from_numpy(codes), tensors, None, Scheme(5, 32))
    assert all(theirs[name].numpy().tobytes() == part.tobytes() for name, part in ours.items())
    assert torch.equal(FORM.unpack(theirs, Scheme(5, 32)), torch.from_numpy(FORM.unpack(ours, Scheme(5, 32))))


def test_other_scales_are_refused():
    codes, grid = linear(32, 64, 4, 32)
    with pytest.raises(NotQuantizable, match="64 of 64 scales are no square"):
        FORM.pack(codes, grid._replace(scale=grid.scale * 1.01), None, Scheme(4, 32))
    with pytest.raises(NotQuantizable, match="needs symmetric groups"):
        FORM.pack(codes, grid._replace(zero=grid.zero + 1), None, Scheme(4, 32))
    with pytest.raises(DoctorError, match="group size 16 in the exl2 format"):
        Recipe(bits=4, group_size=16, format="exl2")
    assert "q_weight would have 43,008 rows" in FORM.unfit(Scheme(8, 128), 172032, 1024)


@EVERY
def test_scales_are_chosen_by_error_and_not_by_rounding(bits):
    generator = torch.Generator().manual_seed(bits)
    W = torch.randn(64, 256, generator=generator) * torch.rand(64, 1, generator=generator) * 0.05
    cost = torch.rand(256, generator=generator)
    free = fit(W, bits, 64, True, mse=True, weight=cost)
    found = snapped(free, W, cost, bits)
    base = (free.scale.amax(0) / 256).to(torch.float16).float()
    plain = squared_scale((free.scale / base).sqrt().round().clamp(1, 16), base)

    def error(scale):
        step = scale.repeat_interleave(64, 1)
        off = W - (W / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        return float((off.square() * cost).sum())

    assert error(found.scale) <= error(plain) and error(found.scale) <= 1.6 * error(free.scale)
    roots = (found.scale / found.divisor).sqrt().round()
    assert torch.equal(squared_scale(roots, found.divisor), found.scale) and float(roots.min()) >= 1


@EVERY
def test_gptq_halves_the_loss_of_rounding_on_these_scales(bits):
    generator = torch.Generator().manual_seed(bits)
    W = torch.randn(96, 128, generator=generator) * 0.02
    X = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    H = 2 * X.T @ X / len(X)
    options = {"bits": bits, "group_size": 32, "squared": True}
    solved, plain = gptq.solve(W, H, **options), round_to_nearest(W, H, **options)
    assert solved.outcome == "gptq" and solved.loss < 0.6 * plain.loss
    parts = FORM.pack(solved.codes, solved.grid, solved.g_idx, Scheme(bits, 32))
    read = FORM.unpack(parts, Scheme(bits, 32), (96, 128))
    E = W - read
    assert float((E @ H * E).sum() / (W @ H * W).sum()) == pytest.approx(solved.loss, rel=0.03, abs=2e-6)


@pytest.mark.parametrize("way", ["native", "torch", "hosted"])
def test_wide_groups_hold_the_largest_inputs_and_lower_the_loss(way, monkeypatch):
    if way != "native":
        monkeypatch.setattr(cpu, "native_loops", lambda: False)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 256, generator=generator) * 0.02
    X = torch.randn(512, 256, generator=generator) * torch.linspace(0.2, 3, 256)[torch.randperm(256)]
    H = 2 * X.T @ X / len(X)
    losses = {}
    for width in (4, 4.1, 4.25, 5):
        scheme = Scheme(group_size=32, **split_width(width))
        options = {"bits": scheme.bits, "wide": scheme.wide, "group_size": 32, "squared": True}
        held = Square(H.clone(), computes=torch.device("cpu")) if way == "hosted" else H
        solved, plain = gptq.solve(W, held, **options), round_to_nearest(W, H, **options)
        assert solved.outcome == "gptq" and solved.loss < 0.95 * plain.loss
        losses[width] = solved.loss
        for each in (solved, plain):
            read = FORM.unpack(FORM.pack(each.codes, each.grid, each.g_idx, scheme), scheme, (96, 256))
            E = W - read
            assert float((E @ H * E).sum() / (W @ H * W).sum()) == pytest.approx(each.loss, rel=0.03, abs=2e-6)
            if scheme.wide:
                widths = torch.tensor(group_bits(scheme.bits, scheme.wide, 8))[each.g_idx.long()]
                assert H.diagonal()[widths == 5].min() >= H.diagonal()[widths == 4].max()
                assert int(each.codes[:, widths == 4].max()) == 15 < int(each.codes[:, widths == 5].max())
    assert losses[4] > 1.1 * losses[4.1] and losses[4.1] > losses[4.25] > losses[5]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(source, output) of a Qwen 2, whose q, k and v have biases, in EXL2."""
    folder = tmp_path_factory.mktemp("exl2")
    source = tiny("qwen2").write(folder / "m")
    recipe = Recipe(**fields_of("EXL2", {"group_size": 32}))
    result = api.quantize(source, folder / "out", recipe, calibration=rows(folder), ignore=["Q"], tune="off")
    assert result.output, [f.message for f in result.report.findings]
    return source, result


def test_an_output_reads_back_as_the_model(written):
    source, result = written
    original, stored, read = (
        Checkpoint.open(source),
        Checkpoint.open(result.output),
        as_float(Checkpoint.open(result.output)),
    )
    stated = stored.value("config.json")["quantization_config"]
    assert stated == {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 16}
    assert set(read.tensors) == set(original.tensors) and "q_perm" not in {n.rpartition(".")[2] for n in stored.tensors}
    for name in read.tensors:
        want, got = load_tensor(original, name).float(), load_tensor(read, name).float()
        assert got.shape == want.shape and float((got - want).norm()) <= 0.2 * float(want.norm()), name
    biases = [i for n, i in stored.tensors.items() if n.endswith("k_proj.bias")]
    assert {i.dtype.name for i in biases} == {"F16"}


def test_check_finds_nothing_in_an_output(written):
    report = api.check(written[1].output)
    assert report.ok and not [f.code for f in report.findings if f.severity in ("error", "warning")]


def widths_in(stored):
    """Widths of the groups of every linear."""
    return {
        name: [g.bits for g in groups_of(stored.load(name), stored.tensors[f"{name[:-9]}.q_weight"].shape[0])]
        for name in stored.tensors
        if name.endswith(".q_groups")
    }


def test_single_linears_get_widths_inside_one_matrix(tmp_path):
    source = tiny("llama").write(tmp_path / "m")
    named = overrides(["down_proj:bits=3.25", "o_proj=6.1"])
    recipe = Recipe(**fields_of("EXL2", {"group_size": 32}), bits_for=named)
    result = api.quantize(source, tmp_path / "out", recipe, calibration=rows(tmp_path), ignore=["Q"], tune="off")
    assert result.output, [f.message for f in result.report.findings]
    for name, widths in widths_in(Checkpoint.open(result.output)).items():
        want = {"down_proj": (4, 3), "o_proj": (8, 6)}.get(name.split(".")[-2], (4,))
        assert tuple(dict.fromkeys(widths)) == want, name
    assert not [f.code for f in api.check(result.output).findings if f.severity in ("error", "warning")]
    with pytest.raises(DoctorError, match=r"PATTERN=BITS with 2, 2\.1, 2\.25, 3"):
        Recipe(format="exl2", bits_for=("down_proj=4.5",))
    with pytest.raises(DoctorError, match="PATTERN=BITS with 2, 3, 4 or 8"):
        Recipe(format="gptq", bits_for=("down_proj=4.1",))


def test_bits_under_a_budget_are_written(tmp_path):
    source = tiny("llama").write(tmp_path / "m")
    recipe, budget = Recipe(**fields_of("EXL2", {"group_size": 32})), Budget(6.2, None, (), tmp_path / "measured.json")
    result = api.quantize(
        source,
        tmp_path / "out",
        recipe,
        calibration=rows(tmp_path),
        ignore=["Q"],
        tune="off",
        budget=budget,
    )
    assert result.output, [f.message for f in result.report.findings]
    stored = Checkpoint.open(result.output)
    linears = widths_in(stored)
    assert set().union(*linears.values()) <= set(FORM.bits)
    assert any(len(set(widths)) == 2 for widths in linears.values())  # a recipe of two widths was worth its bits
    said = result.report.extra["allocation"]
    assert any(width % 1 for width in said["linears"]) and said["bpw"] <= 6.2
    hurts = saved.read(tmp_path / "measured.json", {})
    assert all(set(found) == {w for w in WIDTHS if w >= 3} for found in hurts.values())
    hurt = {width: sum(found[width] for found in hurts.values()) for width in WIDTHS if width >= 3}
    assert hurt[4] > hurt[4.1] >= hurt[4.25] > hurt[5]
    linears = [i for n, i in stored.tensors.items() if n.rpartition(".")[2] in FORM.part_names]
    weights = sum(i.numel for n, i in Checkpoint.open(source).tensors.items() if n.endswith("_proj.weight"))
    assert 8 * sum(i.nbytes for i in linears) <= 6.2 * weights
