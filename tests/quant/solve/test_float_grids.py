"""Grids of 4-bit floats: levels, scales as files hold them, and GPTQ's loop on them, natively and in torch."""

import itertools

import pytest
import torch

from doctor.formats.e2m1 import VALUES
from doctor.quant.solve import gptq, rtn
from doctor.quant.solve.float_scale import FloatScale, divisor_of
from doctor.quant.solve.grid import Grid, dequantize, quantize
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.losses import proxy_loss

DIVISOR = divisor_of(3.7)
KINDS = {"nvfp4": (16, FloatScale(False, DIVISOR)), "mxfp4": (32, FloatScale(True))}
LEVELS = torch.tensor([2 * value + 12 for value in VALUES])


def weights(n=96, k=192):
    rng = torch.Generator().manual_seed(5)
    W = torch.randn(n, k, generator=rng)
    W[2], W[:, 64:80] = 0, 0
    return W


def hessian(k=192, rows=400):
    rng = torch.Generator().manual_seed(6)
    X = torch.randn(rows, k, generator=rng) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=rng) / k**0.5)
    X[:, 7] *= 6
    return 2 / rows * X.T @ X


def is_stored(scale, kind):
    """Whether a scale of halves is one that a file holds."""
    if kind.power:
        return bool((torch.frexp(scale)[0] == 0.5).all())
    stored = (scale * 2 * kind.divisor).to(torch.float8_e4m3fn).float()
    return bool((stored / kind.divisor / 2 == scale).all())


def test_every_value_goes_to_the_nearest_level_and_ties_to_the_even_code():
    levels = torch.tensor(sorted(set(VALUES)))
    grid = Grid(torch.full((1, 1), 0.5), torch.full((1, 1), 12, dtype=torch.int32))
    x = torch.linspace(-7, 7, 2801)[None]
    found = dequantize(quantize(x, grid, 4, scale_dtype=FloatScale(True)), grid)
    distance = (x[0, :, None] - levels).abs().amin(1)
    assert torch.equal((found[0] - x[0]).abs(), distance)
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5]])
    want = [0, 1, 1, 2, 2, 4, 4, 0, -2]  # as compressed-tensors rounds them
    assert dequantize(quantize(ties, grid, 4, scale_dtype=FloatScale(True)), grid)[0].tolist() == want


def test_scales_are_rounded_to_what_a_file_holds():
    scale = torch.logspace(-6, 2, 400)
    for _group, kind in KINDS.values():
        snapped = kind.snap(scale)
        assert is_stored(snapped, kind) and (snapped > 0).all() and torch.equal(kind.snap(snapped), snapped)
        assert snapped.max() <= kind.most
    powers = KINDS["mxfp4"][1].snap(scale)
    assert ((powers / scale).log2().abs() <= 0.5 + 1e-6).all()
    assert divisor_of(0.0) == 1.0 and divisor_of(6 * 448.0) == 1.0


@pytest.mark.parametrize("mse, weighed", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("name", KINDS)
def test_the_native_search_finds_what_torch_finds(name, mse, weighed, monkeypatch):
    group, kind = KINDS[name]
    W, cost = weights(), torch.rand(192, generator=torch.Generator().manual_seed(1)) if weighed else None
    native = fit(W, 4, group, True, mse=mse, weight=cost, scale_dtype=kind)
    monkeypatch.setenv("DOCTOR_NATIVE", "0")
    defined = fit(W, 4, group, True, mse=mse, weight=cost, scale_dtype=kind)
    assert is_stored(native.scale, kind) and (native.zero == 12).all()
    same = (native.scale == defined.scale).float().mean()
    assert same > 0.995 if mse else same == 1  # two candidates of almost one error may change places


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("name, share", [("nvfp4", 0.7), ("mxfp4", 0.7)])
def test_the_loop_beats_rounding_and_stays_on_the_levels(name, share, native, act_order, monkeypatch):
    if not native:
        monkeypatch.setenv("DOCTOR_NATIVE", "0")
    group, kind = KINDS[name]
    W, H = weights(), hessian()
    found = gptq.solve(W, H, bits=4, group_size=group, act_order=act_order, scale_dtype=kind)
    assert found.outcome == "gptq" and is_stored(found.grid.scale, kind)
    assert torch.isin(found.codes.float(), LEVELS).all()
    assert found.loss == pytest.approx(proxy_loss(W, found.weight(), H), rel=1e-3)
    rounded = rtn.round_to_nearest(W, bits=4, group_size=group, scale_dtype=kind)
    assert found.loss < share * proxy_loss(W, rounded.weight(), H)


@pytest.mark.parametrize("name", KINDS)
def test_native_and_torch_loops_lose_alike(name, monkeypatch):
    group, kind = KINDS[name]
    W, H = weights(), hessian()
    native = gptq.solve(W, H, bits=4, group_size=group, scale_dtype=kind)
    monkeypatch.setenv("DOCTOR_NATIVE", "0")
    assert native.loss == pytest.approx(gptq.solve(W, H, bits=4, group_size=group, scale_dtype=kind).loss, rel=0.08)
