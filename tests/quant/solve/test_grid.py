import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.core.errors import NotQuantizable
from doctor.quant.solve.grid import Grid, contiguous_groups, dequantize, quantize, store_scale
from doctor.quant.solve.grid_search import fit


def weights(n, k, seed=0):
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    W[:, 5] *= 30  # an outlier channel
    return W


def weighted_error(W, grid, bits, cost):
    return float(((W - dequantize(quantize(W, grid, bits), grid)).square() * cost).sum())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    group=st.sampled_from([-1, 8, 24]),
    power=st.integers(-6, 2),
    seed=st.integers(0, 1000),
)
def test_minmax_error_is_at_most_half_a_step(bits, sym, group, power, seed):
    W = weights(4, 48, seed) * 10.0**power
    grid = fit(W, bits, group, sym)
    off = (W - dequantize(quantize(W, grid, bits), grid)).abs()
    step = grid.scale.repeat_interleave(48 // grid.scale.shape[1], 1)
    # A float16 scale may be short by 2^-11 (relative) of a span of 2^bits steps; a subnormal one by half of itself.
    slack = 1 + 2**bits * 2.0**-10 + 2**bits * 2.0**-24 / step
    assert torch.isfinite(off).all() and (off <= 0.5 * step * slack).all()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-4, 1.0, 3e3])
def test_every_scale_is_positive_finite_and_exact_in_float16(sym, mse, size):
    grid = fit(weights(8, 64) * size, 4, 32, sym, mse=mse)
    stored = grid.scale.half()
    assert torch.isfinite(stored).all() and (stored > 0).all()
    assert torch.equal(stored.float(), grid.scale)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("mse", [True, False])
def test_a_group_of_zeros_gets_scale_one_and_decodes_to_zeros(sym, mse):
    W = weights(4, 64)
    W[1, :32] = 0
    grid = fit(W, 4, 32, sym, mse=mse, weight=torch.ones(64))
    assert grid.scale[1, 0] == 1 and grid.zero[1, 0] == 8
    assert (dequantize(quantize(W, grid, 4), grid)[1, :32] == 0).all()


def test_zero_weights_are_exact_on_every_grid():
    W = weights(16, 64).clamp_min(0.1)  # no negatives: the asymmetric zero is the lowest code
    W[:, 7] = 0
    for sym in (True, False):
        for mse in (True, False):
            for zero_min in (0, 1):
                grid = fit(W, 3, 16, sym, mse=mse, zero_min=zero_min)
                assert int(grid.zero.min()) >= zero_min and int(grid.zero.max()) <= 7
                assert (dequantize(quantize(W, grid, 3), grid)[:, 7] == 0).all()


def test_symmetric_zero_is_the_middle_code_and_positive_groups_are_not_cut():
    W = torch.rand(8, 32, generator=torch.Generator().manual_seed(3)) + 0.5
    grid = fit(W, 4, -1, True)
    assert (grid.zero == 8).all()
    top = dequantize(quantize(W, grid, 4), grid).amax(1)
    assert (top >= W.amax(1) - 0.51 * grid.scale[:, 0]).all()  # a grid from max - min would end at 7/15 of the max


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_the_search_never_loses_to_minmax_in_any_group(bits, sym):
    W = weights(32, 64)
    cost = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 4
    plain, searched = fit(W, bits, 16, sym), fit(W, bits, 16, sym, mse=True, weight=cost)

    def by_group(grid):
        off = (W - dequantize(quantize(W, grid, bits), grid)).square() * cost
        return off.reshape(32, 4, 16).sum(-1)

    assert (by_group(searched) <= by_group(plain) * (1 + 1e-6)).all()
    assert by_group(searched).sum() < 0.9 * by_group(plain).sum()


def test_column_weights_move_error_to_the_columns_that_matter_less():
    W = weights(64, 64)
    cost = torch.ones(64)
    cost[::2] = 100
    flat, aware = fit(W, 4, 32, True, mse=True), fit(W, 4, 32, True, mse=True, weight=cost)
    assert weighted_error(W, aware, 4, cost) < 0.98 * weighted_error(W, flat, 4, cost)
    assert weighted_error(W, flat, 4, torch.ones(64)) < weighted_error(W, aware, 4, torch.ones(64))


def test_search_is_the_same_alone_and_in_a_larger_matrix():
    W = weights(700, 512)  # more than one chunk of rows
    whole = fit(W, 4, 128, False, mse=True, weight=torch.rand(512))
    again = fit(W, 4, 128, False, mse=True, weight=torch.ones(512))
    one = fit(W[600:601], 4, 128, False, mse=True, weight=torch.ones(512))
    assert torch.equal(again.scale[600:601], one.scale) and torch.equal(again.zero[600:601], one.zero)
    assert not torch.equal(whole.scale, again.scale)


def test_quantize_on_the_grid_is_exact_and_scaling_keeps_codes():
    W = weights(8, 64)
    grid = fit(W, 4, 32, False)
    codes = quantize(W, grid, 4)
    assert torch.equal(quantize(dequantize(codes, grid), grid, 4), codes)
    louder = Grid(grid.scale * 4, grid.zero)
    assert torch.equal(quantize(W * 4, louder, 4), codes)


def test_scattered_groups_read_their_own_scale():
    W = weights(4, 64)
    grid = fit(W, 4, 32, True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    g_idx = contiguous_groups(64, 32)
    assert torch.equal(quantize(W[:, order], grid, 4, g_idx[order]), quantize(W, grid, 4)[:, order])
    assert torch.equal(dequantize(quantize(W, grid, 4), grid, g_idx), dequantize(quantize(W, grid, 4), grid))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_named(value):
    W = weights(4, 64)
    W[2, 9] = W[3, 1] = value
    with pytest.raises(NotQuantizable, match=rf"W\[2, 9\] is {value} \(2 non-finite values\)"):
        fit(W, 4, 32, True)


def test_what_no_grid_can_hold_is_refused_with_numbers():
    with pytest.raises(NotQuantizable, match="in_features 100 is not a multiple of group_size 32"):
        fit(torch.ones(2, 100), 4, 32, True)
    with pytest.raises(NotQuantizable, match="bits is 9"):
        fit(torch.ones(2, 64), 9, 32, True)
    with pytest.raises(NotQuantizable, match="the scale 266667, and float16 ends at 65504"):
        fit(torch.full((2, 64), 2e6), 4, 32, True)
    assert torch.isfinite(fit(torch.full((2, 64), 2e6), 4, 32, True, scale_dtype=torch.bfloat16).scale).all()
    assert store_scale(torch.tensor([1e-30])).item() == 2.0**-24
