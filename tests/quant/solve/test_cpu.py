"""The native loops against the torch code that defines them."""

import pytest
import torch

from doctor.core.errors import NotQuantizable
from doctor.quant.solve import columns, cpu, gptq, grid, grid_search, losses
from doctor.quant.solve.gptq import solve
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.losses import proxy_loss
from doctor.scan import native

LEVELS = ["base", "avx2", "avx512"]
pytestmark = pytest.mark.skipif(native.native_path() is None, reason="no native library")


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", request.param)
    if native.level() != request.param:
        pytest.skip(f"this processor has no {request.param}")


def in_torch(monkeypatch):
    monkeypatch.setenv("DOCTOR_NATIVE", "0")


def weights(n, k, seed=0):
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    W[0] *= 0 if n > 1 else 1
    W[-1, : k // 2] *= 30
    return W


def hessian(k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(500, k, generator=generator) @ (torch.eye(k) + torch.randn(k, k, generator=generator) / k**0.5)
    X[:, 3] *= 20
    X[:, 5] = 0
    H = Hessian(k)
    H.add(X)
    return H.take()


def errors_of(W, found, bits, cost):
    off = (grid.dequantize(grid.quantize(W, found, bits), found) - W).double().square()
    groups = found.scale.shape[1]
    return (off if cost is None else off * cost).reshape(len(W), groups, -1).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym, signed", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("n, k, width", [(7, 96, 32), (33, 210, 35), (5, 77, 77), (1, 8, 8)])
def test_grids_of_both_paths_are_equal_but_for_ties(level, monkeypatch, bits, sym, signed, n, k, width):
    W, cost = weights(n, k), torch.rand(k, generator=torch.Generator().manual_seed(2)) + 0.01
    for weight in (None, cost):
        options = {"mse": True, "weight": weight, "signed": signed, "zero_min": 1}
        got = grid_search.fit(W, bits, width, sym, **options)
        with monkeypatch.context() as patch:
            in_torch(patch)
            want = grid_search.fit(W, bits, width, sym, **options)
        # Sums run in another order, so that a near-tie between two candidates may fall to the other one.
        assert ((got.scale == want.scale) & (got.zero == want.zero)).double().mean() > 0.9
        ours, theirs = errors_of(W, got, bits, weight), errors_of(W, want, bits, weight)
        assert torch.isfinite(ours).all() and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-5, 1.0, 1e3])
@pytest.mark.parametrize("sym", [True, False])
def test_min_max_grids_are_bit_equal(level, monkeypatch, dtype, size, sym):
    W = weights(9, 64) * size
    got = grid_search.fit(W, 4, 16, sym, scale_dtype=dtype)
    in_torch(monkeypatch)
    want = grid_search.fit(W, 4, 16, sym, scale_dtype=dtype)
    assert torch.equal(got.scale, want.scale) and torch.equal(got.zero, want.zero)


def test_scales_that_would_be_stored_as_inf_are_refused(level):
    with pytest.raises(NotQuantizable, match="float16 ends at 65504"):
        grid_search.fit(weights(4, 32) * 1e7, 4, 16, True, mse=True)


def test_nan_is_refused_before_the_native_loops_see_it(level):
    W, H = weights(4, 32), hessian(32)
    W[2, 7] = float("nan")
    with pytest.raises(NotQuantizable, match=r"W\[2, 7\] is nan"):
        solve(W, H, group_size=16)
    H[3, 3] = float("nan")
    with pytest.raises(NotQuantizable, match="H has 1 non-finite"):
        solve(weights(4, 32), H, group_size=16)


@pytest.mark.parametrize("bits, sym", [(2, True), (3, False), (4, True), (8, False)])
@pytest.mark.parametrize("n, k, group", [(37, 192, 32), (5, 330, 66), (64, 300, -1), (1, 129, 129)])
@pytest.mark.parametrize("act_order", [True, False])
def test_solutions_of_both_paths_agree(level, monkeypatch, bits, sym, n, k, group, act_order):
    W, H = weights(n, k), hessian(k)
    options = {"bits": bits, "group_size": group, "sym": sym, "act_order": act_order, "signed": sym}
    got = solve(W, H, **options)
    in_torch(monkeypatch)
    want = solve(W, H, **options)
    assert got.outcome == want.outcome == "gptq"
    # One value near a tie that falls to the other side takes its followers along, and refinement in torch fits all
    # scales of a row together after its codes, not each group's at once; the loss hardly moves.
    assert got.loss == pytest.approx(want.loss, rel=0.08 if bits == 2 else 0.05)
    assert got.rtn_loss == pytest.approx(want.rtn_loss, rel=2e-3)
    assert got.loss == pytest.approx(proxy_loss(W, got.weight(), H), rel=1e-4)


def test_a_column_loop_with_exact_arithmetic_is_bit_equal(level, monkeypatch):
    """Small integers over powers of two: no rounding anywhere, so the order of sums cannot matter."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randint(-64, 64, (45, 70), generator=generator) / 8.0
    U = torch.eye(70) + torch.triu(torch.randint(-2, 3, (70, 70), generator=generator) / 4.0, 1) * (
        torch.rand(70, 70) < 0.02
    )
    rules = grid.GridParams(4, 10, True, False, False, 0, torch.float16)
    static = grid.Grid(torch.full((45, 7), 0.5), torch.full((45, 7), 8, dtype=torch.int32))
    groups, steps = grid.contiguous_groups(70, 10), torch.arange(70, dtype=torch.int32)
    want, _ = columns.round_columns(W.T.contiguous(), U, rules, groups, static)
    M = torch.linalg.inv(U.double()).float()
    got, _, _, loss, excess = cpu.round_columns(
        W,
        M.flip(0, 1).contiguous(),
        steps,
        groups,
        torch.full((70,), 0.5),
        grid_search.native_params_of(rules)[0],
        static,
    )
    assert torch.equal(got.T, want)
    E = W - grid.dequantize(got, static)
    assert torch.allclose(loss.float(), (E @ M).square().sum(1)) and torch.allclose(
        excess.float(), 0.5 * E.square().sum(1)
    )


@pytest.mark.parametrize("n, k, group", [(37, 192, 32), (5, 128, 64), (130, 264, 132)])
def test_refinement_says_by_how_much_it_lowers_the_loss(level, n, k, group):
    W, H = weights(n, k), hessian(k)
    extra = torch.full((k,), 0.01 * float(H.diagonal().mean()))
    found, g_idx = grid_search.fit(W, 3, group, True), grid.contiguous_groups(k, group)
    codes, damped = grid.quantize(W, found, 3), H + torch.diag(extra)
    rule, _ = grid_search.native_params_of(grid.GridParams(3, group, True, False, False, 0, torch.float16))
    before = losses.energies(W - grid.dequantize(codes, found), damped)
    for width in (0, group) if cpu.fits(group) else (0,):
        moved, *scales, change, excess = cpu.refine(
            W, H, H.diagonal(), torch.arange(k, dtype=torch.int32), g_idx, extra, rule, codes, found, width
        )
        E = W - grid.dequantize(moved, grid.Grid(*scales))
        after = losses.energies(E, damped)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.9 * before.sum()
        assert torch.allclose(before + change, after, rtol=1e-3) and torch.allclose(
            excess, (E.square() @ extra).double(), rtol=1e-4
        )
        assert torch.equal(scales[0], scales[0].half().float()) and (width > 0) == (
            not torch.equal(scales[0], found.scale)
        )


def test_losses_of_many_rows_are_told_from_a_sample_unless_they_are_close(monkeypatch):
    monkeypatch.setattr(gptq, "SAMPLE_WEIGHTS", 128 * 96)
    W, H = torch.randn(1000, 96, generator=torch.Generator().manual_seed(4)), hessian(96)
    W[::9] *= 3
    solution = solve(W, H, group_size=32)
    assert solution.loss == pytest.approx(proxy_loss(W, solution.weight(), H), rel=0.05)
    assert solution.rtn_loss == pytest.approx(0.0023606, rel=0.15)
    monkeypatch.setattr(losses, "_CLEAR", 0.0)
    exact = solve(W, H, group_size=32)
    assert exact.loss == pytest.approx(proxy_loss(W, exact.weight(), H), rel=1e-4)
    assert exact.rtn_loss == pytest.approx(0.0023606, rel=1e-3) and torch.equal(solution.codes, exact.codes)


@pytest.mark.parametrize("act_order", [True, False])
def test_threads_do_not_change_a_solution(act_order):
    W, H = weights(1100, 256), hessian(256)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(solve(W, H, group_size=32, act_order=act_order))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes) and torch.equal(found[0].grid.scale, found[1].grid.scale)


def test_threads_do_not_change_a_row(monkeypatch):
    W, H = weights(1100, 256), hessian(256)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(grid_search.fit(W, 4, 32, False, mse=True, weight=H.diagonal().clamp_min(1e-3)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].scale, found[1].scale) and torch.equal(found[0].zero, found[1].zero)


def test_a_run_without_the_library_says_what_that_costs(monkeypatch):
    assert cpu.note("cpu") == ""
    in_torch(monkeypatch)
    assert "column loops run in torch" in cpu.note("cpu")
    assert cpu.note("cuda") == "", "a GPU does not use the library"
