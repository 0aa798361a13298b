import itertools
import math

import pytest
import torch

from doctor.core.errors import NotQuantizable
from doctor.quant.solve.columns import round_columns
from doctor.quant.solve.factor import factorise
from doctor.quant.solve.gptq import solve
from doctor.quant.solve.grid import Grid, GridParams, contiguous_groups, dequantize, quantize
from doctor.quant.solve.grid_search import fit
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.losses import proxy_loss
from doctor.quant.solve.refine import descend, refit_scales
from doctor.quant.solve.rtn import round_to_nearest

PLAIN = {"mse": False, "signed": False, "refine": 0}


def weights(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def hessian(k, tokens=600, seed=1, dead=()):
    """H of correlated rows with an outlier channel, as decoder blocks have them."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, k, generator=generator) @ (
        torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator) / k**0.5 * 3
    )
    X[:, 3] *= 20
    X[:, list(dead)] = 0
    H = Hessian(k)
    H.add(X)
    return H.take()


def same(a, b):
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.grid.scale, b.grid.scale)
        and torch.equal(a.grid.zero, b.grid.zero)
    )


def by_the_book(W, H, grid, g_idx, order, damp, bits):
    """Algorithm 1 of the paper in float64, one column at a time, with the usual three factorizations."""
    H = H.double()[order][:, order]
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    T, codes = W.double()[:, order].clone(), torch.zeros(W.shape, dtype=torch.uint8)
    for j in range(len(H)):
        group = int(g_idx[order[j]])
        column = Grid(grid.scale[:, group : group + 1], grid.zero[:, group : group + 1])
        code = quantize(T[:, j : j + 1].float(), column, bits)
        codes[:, order[j]] = code[:, 0]
        error = (T[:, j] - dequantize(code, column)[:, 0].double()) / U[j, j]
        T[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k", [48, 320])
def test_static_groups_give_the_codes_of_the_paper(act_order, k):
    W, H = weights(24, k), hessian(k)
    grid, g_idx = fit(W, 4, 16, False), contiguous_groups(k, 16)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(k)
    U, info = factorise(H[order][:, order], 0.01)
    rules = GridParams(4, 16, False, False, False, 0, torch.float16)
    codes, kept = round_columns(W[:, order].T.contiguous(), U, rules, g_idx[order], grid)
    codes = codes[torch.argsort(order)].T
    book = by_the_book(W, H, grid, g_idx, order, 0.01, 4)
    assert info == 0 and torch.equal(kept.scale, grid.scale)
    # float32 against float64: a value near a tie may fall to the other side, and takes its followers along
    assert (codes != book).double().mean().item() < 0.01
    assert proxy_loss(W, dequantize(codes, grid), H) == pytest.approx(
        proxy_loss(W, dequantize(book, grid), H), rel=5e-3
    )
    assert (book != quantize(W, grid, 4)).double().mean().item() > 0.1


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_with_the_identity_as_hessian_every_code_is_rounded_to_nearest(sym, act_order, mse):
    W = weights(16, 192)
    found = solve(
        W, 2 * torch.eye(192), bits=4, group_size=64, sym=sym, act_order=act_order, mse=mse, signed=True, refine=0
    )
    plain = fit(W, 4, 64, sym, mse=mse, signed=True, weight=torch.full((192,), 2.02), zero_min=1)
    assert torch.equal(found.codes, quantize(W, plain, 4)) and torch.equal(found.grid.scale, plain.scale)
    assert found.loss == pytest.approx(found.rtn_loss, rel=1e-6) and found.outcome == "gptq"


@pytest.mark.parametrize("act_order", [False, True])
def test_damping_without_bound_reproduces_rounding_to_nearest(act_order):
    W, H = weights(16, 128), hessian(128)
    found = solve(W, H, group_size=32, act_order=act_order, damp=1e9, damp_max=1e9, **PLAIN)
    assert torch.equal(found.codes, quantize(W, fit(W, 4, 32, True), 4))


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_the_scale_of_the_hessian_does_not_change_a_code(factor):
    W, H = weights(16, 128), hessian(128)
    assert same(solve(W, H, group_size=32), solve(W, H * factor, group_size=32))


def test_scaling_rows_scales_the_grid_and_keeps_the_codes():
    W, H = weights(16, 128), hessian(128)
    power = torch.tensor([1.0, 4.0, 0.25, 16.0]).repeat(4)[:, None]
    small, large = solve(W, H, group_size=32), solve(W * power, H, group_size=32)
    assert torch.equal(small.codes, large.codes)
    assert torch.equal(small.grid.scale * power, large.grid.scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("flavour", [{"act_order": False}, {"act_order": True}, {"act_order": True, "scattered": True}])
def test_gptq_beats_rounding_to_nearest_for_every_width_and_order(bits, flavour):
    W, H = weights(32, 192), hessian(192)
    for sym in (True, False):
        found = solve(W, H, bits=bits, group_size=64, sym=sym, **flavour)
        assert found.loss < 0.75 * found.rtn_loss
        assert found.loss == pytest.approx(proxy_loss(W, found.weight(), H), rel=1e-6)
        assert int(found.codes.max()) < 2**bits and torch.bincount(found.g_idx.long()).tolist() == [64] * 3


def test_groups_stay_neighbours_unless_scattered_is_asked_for():
    W, H = weights(8, 128), hessian(128)
    assert torch.equal(solve(W, H, group_size=32).g_idx, contiguous_groups(128, 32))
    scattered = solve(W, H, group_size=32, scattered=True).g_idx
    loudest = torch.argsort(H.diagonal(), descending=True, stable=True)[:32]
    assert (scattered[loudest] == 0).all() and not torch.equal(scattered, contiguous_groups(128, 32))


@pytest.mark.parametrize("group_size", [8, 24, 96, 160, 480, -1])
def test_a_group_that_opens_inside_a_block_sees_every_earlier_correction(group_size):
    W, H = weights(8, 480), hessian(480, tokens=1500)
    found = solve(W, H, group_size=group_size, act_order=False, **PLAIN)
    U, _ = factorise(H, 0.01)
    width = 480 if group_size == -1 else group_size
    T, scales = W.clone(), []
    for j in range(480):  # no blocks: every correction at once
        if j % width == 0:
            scales.append(fit(T[:, j : j + width], 4, -1, True))
        code = quantize(T[:, j : j + 1], scales[-1], 4)
        error = (T[:, j] - dequantize(code, scales[-1])[:, 0]) / U[j, j]
        T[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
    wanted = torch.cat([grid.scale for grid in scales], 1)
    assert ((found.grid.scale - wanted).abs() / wanted).median().item() < 1e-3
    assert ((found.grid.scale - wanted).abs() / wanted).max().item() < 0.2


def test_padded_columns_change_no_code_of_the_columns_that_were_there():
    W, H = weights(16, 192), hessian(192)
    padded_W = torch.cat([W, torch.zeros(16, 64)], 1)
    padded_H = torch.zeros(256, 256)
    padded_H[:192, :192] = H
    for act_order in (True, False):
        found = solve(W, H, group_size=64, act_order=act_order)
        padded = solve(padded_W, padded_H, group_size=64, act_order=act_order)
        assert torch.equal(padded.codes[:, :192], found.codes)
        assert torch.equal(padded.grid.scale[:, :3], found.grid.scale)
        assert (padded.weight()[:, 192:] == 0).all() and (padded.grid.scale[:, 3] == 1).all()


def test_dead_columns_are_rounded_to_nearest_and_not_dropped():
    W, H = weights(16, 128), hessian(128, dead=(7, 40, 41))
    for flavour in ({"act_order": True}, {"act_order": False}, {"scattered": True}):
        found = solve(W, H, group_size=32, refine=1, **flavour)
        dead = [7, 40, 41]
        nearest = quantize(W, found.grid, 4, found.g_idx)
        assert torch.equal(found.codes[:, dead], nearest[:, dead])
        assert (found.weight()[:, dead] - W[:, dead]).abs().mean() < 0.3 * W[:, dead].abs().mean()


def test_no_step_of_refinement_raises_the_loss():
    W, H = weights(24, 160), hessian(160)
    start = solve(W, H, bits=3, group_size=32, refine=0)
    codes, grid = start.codes, start.grid
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(160)
    losses = [proxy_loss(W, dequantize(codes, grid), damped)]
    for _ in range(3):
        codes = descend(W, damped, codes, grid, start.g_idx, GridParams(3, 32, True, True, False, 1, torch.float16))
        losses.append(proxy_loss(W, dequantize(codes, grid), damped))
        grid = refit_scales(W, damped, codes, grid, start.g_idx)
        losses.append(proxy_loss(W, dequantize(codes, grid), damped))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[1] < losses[0] and losses[2] < losses[1]
    assert torch.equal(grid.scale.half().float(), grid.scale)


def test_descent_stops_where_no_single_code_can_be_bettered():
    W, H = weights(3, 16), hessian(16)
    grid, g_idx = fit(W, 2, -1, True), contiguous_groups(16, -1)
    codes = quantize(W, grid, 2)
    for _ in range(30):
        codes = descend(W, H, codes, grid, g_idx, GridParams(2, -1, True, True, False, 1, torch.float16))
    least = proxy_loss(W, dequantize(codes, grid), H)
    for row in range(3):
        for column in range(16):
            for code in range(4):
                other = codes.clone()
                other[row, column] = code
                assert proxy_loss(W, dequantize(other, grid), H) >= least * (1 - 1e-5)


def test_refitted_scales_are_the_least_squares_solution():
    W, H = weights(5, 64), hessian(64).double()
    grid, g_idx = fit(W, 4, 16, True), contiguous_groups(64, 16)
    codes = quantize(W, grid, 4)
    refit = refit_scales(W, H.float(), codes, grid, g_idx, torch.float32)
    root = torch.linalg.cholesky(H, upper=True)  # |E root^T|^2 = E H E^T
    for row in range(5):
        level = (codes[row].double() - 8) * torch.nn.functional.one_hot(g_idx.long(), 4).T
        wanted = torch.linalg.lstsq((level @ root.T).T, (W[row].double() @ root.T)[:, None]).solution[:, 0]
        assert (refit.scale[row].double() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_signed_scales_only_where_asked_for_and_symmetric():
    W, H = weights(16, 128), hessian(128)
    signed, plain = solve(W, H, group_size=32, signed=True), solve(W, H, group_size=32)
    assert (signed.grid.scale < 0).any() and (signed.grid.scale > 0).any()
    assert (plain.grid.scale > 0).all() and (solve(W, H, group_size=32, sym=False, signed=True).grid.scale > 0).all()
    assert signed.loss < 0.95 * plain.loss


def test_the_same_input_gives_the_same_bytes():
    W, H = weights(32, 256), hessian(256)
    assert same(solve(W, H, group_size=64), solve(W.clone(), H.clone(), group_size=64))


def test_the_input_is_left_as_it_was():
    W, H = weights(8, 64), hessian(64)
    before = W.clone(), H.clone()
    solve(W, H, group_size=32)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_stops_with_its_place(value):
    W, H = weights(8, 64), hessian(64)
    bad = W.clone()
    bad[2, 5] = value
    with pytest.raises(NotQuantizable, match=rf"W\[2, 5\] is {value}"):
        solve(bad, H, group_size=32)
    worse = H.clone()
    worse[6, 9] = worse[9, 6] = value
    for run in (lambda: solve(W, worse, group_size=32), lambda: round_to_nearest(W, worse, group_size=32)):
        with pytest.raises(NotQuantizable, match="H has 2 non-finite entries, first in column 6"):
            run()


def test_without_a_factor_the_outcome_says_rtn_and_lists_every_attempt():
    W, H = weights(8, 64), hessian(64)
    broken = torch.eye(64)
    broken[0, 1] = broken[1, 0] = 5.0
    found = solve(W, broken, group_size=32, damp=0.0, damp_max=0.0)
    assert found.outcome == "rtn" and [a.outcome for a in found.attempts] == ["not-positive"] * 2
    assert torch.equal(found.codes, quantize(W, found.grid, 4))
    rtn = round_to_nearest(W, H, group_size=32)
    assert rtn.outcome == "rtn" and rtn.attempts == () and rtn.loss == rtn.rtn_loss > 0
    plain = round_to_nearest(W, group_size=32)
    off = W - dequantize(plain.codes, plain.grid)
    assert plain.loss == plain.rtn_loss == pytest.approx(float(off.square().sum() / W.square().sum()), rel=1e-4)


def test_a_linear_that_no_row_reached_is_rounded_to_nearest():
    W = weights(8, 64)
    found = solve(W, torch.zeros(64, 64), group_size=32)
    assert found.outcome == "rtn" and math.isnan(found.loss)
    assert torch.equal(found.codes, quantize(W, found.grid, 4))


def test_a_hessian_of_another_linear_is_refused():
    with pytest.raises(NotQuantizable, match=r"H is \[32, 32\] for W\[8, 64\]: H must be \[64, 64\]"):
        solve(weights(8, 64), hessian(32), group_size=32)
    with pytest.raises(NotQuantizable, match="in_features 64 is not a multiple of group_size 48"):
        solve(weights(8, 64), hessian(64), group_size=48)


def test_a_weight_of_zeros_is_quantized_without_loss():
    X = torch.randn(64, 32)
    solution = solve(torch.zeros(8, 32), X.T @ X, group_size=32)
    assert solution.loss == solution.rtn_loss == 0 and not solution.weight().any()
