"""GPTQ on a device that is too small for the Hessian: the square in the host's memory, rows of it on the device."""

import pytest
import torch

from doctor.quant.solve import hessian, hosted, square
from doctor.quant.solve.gptq import solve
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.losses import proxy_loss
from doctor.quant.solve.numerics import tiles_of
from doctor.quant.solve.square import Square
from doctor.scan import native

pytestmark = pytest.mark.skipif(native.level() is None, reason="needs the native library")


def example(n, k):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(2 * k, k, generator=generator) @ (torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    return torch.randn(n, k, generator=generator) * 0.02, X


@pytest.fixture
def tiles(monkeypatch):
    """Tiles of 50 columns and chunks of 20 rows, so that a small square has several."""
    monkeypatch.setattr(square, "TILE", 50)
    monkeypatch.setattr(hessian, "tiles_of", lambda k, tile=50: tiles_of(k, tile))
    monkeypatch.setattr(hosted, "LOOP_BYTES", 4 * 192 * 20)


CPU = torch.device("cpu")  # in a device's place: what is copied and where is tests/cuda's


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_order": False},
        {"scattered": True},
        {"bits": 3, "sym": False},
        {"group_size": 48, "act_order": False},
        {"group_size": 96, "scattered": True},
        {"group_size": -1},
        {"refine": 0},
    ],
    ids=str,
)
def test_a_square_in_the_hosts_memory_loses_what_one_on_the_device_does(options, tiles):
    options = {"group_size": 64, **options}
    W, X = example(30, 192)
    H = 2 / len(X) * X.T @ X
    want = solve(W, H, **options)
    summed = Hessian(192, device=CPU, hosted=True)
    summed.add(X[:150])
    summed.add(X[150:])
    held = Square(summed.take(), computes=CPU)
    got = solve(W, held, **options)
    assert held.hosted and [a.outcome for a in got.attempts] == ["ok"]
    assert torch.equal(got.codes, solve(W, held, **options).codes)  # the factor is kept for the next linear
    loss, reference = proxy_loss(W, got.weight(), H), proxy_loss(W, want.weight(), H)
    assert loss == pytest.approx(reference, rel=0.02) and got.loss == pytest.approx(loss, rel=0.01)
    assert got.rtn_loss == pytest.approx(want.rtn_loss, rel=0.02) and loss < 0.9 * got.rtn_loss


def test_a_square_in_the_hosts_memory_is_damped_further_where_it_must_be(tiles):
    W, _X = example(20, 128)
    X = torch.randn(20, 128, generator=torch.Generator().manual_seed(2))
    H = 2 / 20 * X.T @ X
    want = solve(W, H, damp=1e-9, group_size=64)
    got = solve(W, Square(H.clone(), computes=CPU), damp=1e-9, group_size=64)
    assert [a.precision for a in want.attempts][:2] == [a.precision for a in got.attempts][:2] == ["float32", "float64"]
    assert got.outcome == "gptq" and got.loss == pytest.approx(want.loss, rel=0.1, abs=1e-4)


def test_where_no_channel_was_active_a_square_in_the_hosts_memory_is_rounded_to_nearest(tiles):
    W, _X = example(20, 128)
    assert solve(W, Square(torch.zeros(128, 128), computes=CPU), group_size=64).outcome == "rtn"
