"""R0: the torch functions that kernels are compared with equal their definitions, written out in float64."""

import packing as pack
import pytest
import torch
from judges import grid_of, judge_columns, judge_fit, problem

from doctor.quant.solve import columns, grid, grid_search
from doctor.quant.solve.grid import contiguous_groups

pytestmark = pytest.mark.R0


def column_by_column(T, U, static, groups, bits):
    """Frantar et al. 2022, algorithm 1, one column and one rank-1 correction at a time, in float64."""
    T, U = T.to(torch.float64).clone(), U.to(torch.float64)
    codes = torch.empty(T.shape, dtype=torch.uint8)
    for j in range(len(T)):
        scale, zero = static.scale[:, groups[j]].to(torch.float64), static.zero[:, groups[j]]
        codes[j] = ((T[j] / scale).round() + zero).clamp(0, 2**bits - 1)
        error = (T[j] - (codes[j] - zero) * scale) / U[j, j]
        T[j + 1 :] -= U[j, j + 1 :, None] * error
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_the_torch_loop_is_algorithm_1(bits, sym):
    T, U, _ = problem(160, 60, seed=bits)
    static, groups = grid_of(T, bits, 32, sym), contiguous_groups(160, 32)
    want = column_by_column(T, U, static, groups, bits)
    rule = grid.GridParams(bits, 32, sym, True, False, 0, torch.float16)
    got, _ = columns.round_columns(T.clone(), U, rule, groups, static)
    assert (got == want).all(0).float().mean() >= 0.85  # a tie that float32 sees otherwise changes the rest of a row
    judge_columns(T, U, want, static, groups, bits)
    judge_columns(T, U, got, static, groups, bits)


def test_the_judge_of_columns_refuses_one_code_off_by_one():
    T, U, _ = problem(96, 20)
    static, groups = grid_of(T, 4, 32, True), contiguous_groups(96, 32)
    codes = column_by_column(T, U, static, groups, 4)
    codes[40, 7] = codes[40, 7] + 1 if codes[40, 7] < 15 else 14
    with pytest.raises(AssertionError, match="codes do not follow from those before them, first at column 40"):
        judge_columns(T, U, codes, static, groups, 4)


def test_the_judge_of_grids_refuses_a_worse_one():
    T, _, _ = problem(128, 400)
    W = T.T.contiguous()
    want = grid_search.fit(W, 4, 64, True, mse=True)
    worse = grid.Grid(want.scale.clone(), want.zero)
    worse.scale[3, 1] *= 1.05
    with pytest.raises(AssertionError, match="worse than the reference"):
        judge_fit(W, worse, want, None, 4)


@pytest.mark.parametrize("sym", [True, False])
def test_the_search_never_loses_to_minmax_in_float64(sym):
    T, _, cost = problem(128, 50)
    W = T.T.contiguous()
    weight = cost.to(torch.float64).reshape(1, 2, 64)
    part = W.to(torch.float64).reshape(50, 2, 64)
    error = []
    for mse in (True, False):
        found = grid_search.fit(W, 3, 64, sym, mse=mse, weight=cost)
        codes = grid.quantize(W, found, 3)
        error.append(((grid.dequantize(codes, found).reshape(50, 2, 64) - part) ** 2 * weight).sum(-1))
    assert (error[0] <= error[1] * (1 + 1e-5)).all() and (error[0] < error[1]).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_one_little_endian_bit_stream(bits):
    codes = torch.randint(0, 2**bits, (77, 3), dtype=torch.uint8)
    for column, words in zip(codes.T.tolist(), pack.pack_columns(codes, bits).T.tolist(), strict=False):
        stream = sum(code << e * bits for e, code in enumerate(column))
        assert [word & 0xFFFFFFFF for word in words] == [stream >> 32 * w & 0xFFFFFFFF for w in range(len(words))]
