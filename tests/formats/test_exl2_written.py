"""EXL2 as it is written: what the reader, which is proved on the reference's kernels, makes of it."""

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.exl2 import broken_groups, groups_of
from doctor.formats.grid import Grid, squared_scale
from doctor.formats.registry import KNOWN
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny
from doctor.quant.allocation.budget import Budget
from doctor.quant.dequantize import as_float
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.solve import gptq
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.rtn import round_to_nearest
from doctor.quant.solve.squared_scale import snapped
from tests.helpers.gguf_models import rows

FORM = KNOWN["exl2"]
EVERY = pytest.mark.parametrize("bits", FORM.bits)


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


def test_bits_under_a_budget_are_written(tmp_path):
    source = tiny("llama").write(tmp_path / "m")
    recipe = Recipe(**fields_of("EXL2", {"group_size": 32}))
    result = api.quantize(
        source,
        tmp_path / "out",
        recipe,
        calibration=rows(tmp_path),
        ignore=["Q"],
        tune="off",
        budget=Budget(6.2, None, (), None),
    )
    assert result.output, [f.message for f in result.report.findings]
    stored = Checkpoint.open(result.output)
    widths = {
        groups_of(stored.load(name), stored.tensors[f"{name.removesuffix('.q_groups')}.q_weight"].shape[0])[0].bits
        for name in stored.tensors
        if name.endswith(".q_groups")
    }
    assert widths <= set(FORM.bits)
    linears = [i for n, i in stored.tensors.items() if n.rpartition(".")[2] in FORM.part_names]
    weights = sum(i.numel for n, i in Checkpoint.open(source).tensors.items() if n.endswith("_proj.weight"))
    assert 8 * sum(i.nbytes for i in linears) <= 6.2 * weights
