import math

import pytest
import torch

from doctor.quant.solve.factor import factorise, factorise_with_escalation
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.numerics import exact_products, live_mean
from doctor.quant.solve.spectrum import dead_columns, power_iteration, spectrum


def rows(n, k, seed=0, sink=0.0):
    """n calibration rows; `sink` adds one dense direction of that strength to the first."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, k, generator=generator)
    X[0] += sink * torch.randn(k, generator=generator)
    return X


def hessian_of(X, dtype=torch.float32):
    H = Hessian(X.shape[1], dtype)
    H.add(X)
    return H.take()


@pytest.mark.parametrize("by_halves", [True, False])
@pytest.mark.parametrize("k", [40, 256, 700])
def test_batches_add_up_to_two_over_n_times_the_gram_matrix(k, by_halves):
    X = rows(300, k)
    sums = Hessian(k)
    if not by_halves:  # as on a device
        sums._syrk = None
    for part in (X[:7].reshape(1, 7, k), X[7:100], X[100:]):
        sums.add(part)
    want = 2 / 300 * X.double().T @ X.double()
    assert sums.rows == 300
    before = sums.sums.data_ptr()
    H = sums.take()
    assert H.data_ptr() == before and torch.equal(H, H.T)
    assert ((H - want).abs().max() / want.max()).item() < 1e-6


def test_half_precision_rows_lose_nothing_in_the_sums():
    X = rows(64, 32).to(torch.bfloat16)
    want = 2 / 64 * X.double().T @ X.double()
    assert (hessian_of(X) - want).abs().max() <= 1e-5
    assert (hessian_of(X, torch.float64) - want).abs().max() <= 1e-14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_non_finite_value_is_named_over_batches(value):
    H = Hessian(8)
    H.add(torch.ones(10, 8))
    assert H.nonfinite is None
    bad = torch.ones(2, 5, 8)
    bad[1, 2, 3] = bad[1, 4, 0] = value
    H.add(bad)
    H.add(bad[1])
    first = H.nonfinite
    assert (first.row, first.channel, first.count) == (10 + 7, 3, 4)
    assert not spectrum(H.take(), H.rows).finite


def test_finite_rows_whose_squares_overflow_are_seen_in_the_spectrum():
    H = Hessian(4)
    H.add(torch.full((2, 4), 1e20))
    assert H.nonfinite is None
    taken = H.take()
    assert not spectrum(taken, 2).finite
    assert factorise(taken, 0.01) == (None, -1)


def test_dead_columns_do_not_count_in_the_mean():
    X = rows(200, 24)
    padded = torch.cat([X, torch.zeros(200, 8)], 1)
    H = hessian_of(padded)
    assert dead_columns(H).tolist() == [False] * 24 + [True] * 8
    assert live_mean(H) == pytest.approx(live_mean(hessian_of(X)), rel=1e-12)
    facts = spectrum(H, 200)
    assert (facts.dead, facts.rank_bound, facts.columns) == (8, 24, 32)
    assert live_mean(torch.zeros(3, 3)) == 0.0


def test_spectrum_agrees_with_the_eigenvalues():
    H = hessian_of(rows(100, 64, sink=30), torch.float64)
    facts = spectrum(H, 100, damp=0.01)
    values = torch.linalg.eigvalsh(H)
    assert facts.lambda_max == pytest.approx(float(values[-1]), rel=1e-6)
    floor = 0.01 * facts.mean_diag
    true_condition = float((values[-1] + floor) / (values[0] + floor))
    assert true_condition <= facts.condition < 3 * true_condition
    assert facts.lambda_ratio == pytest.approx(facts.lambda_max / float(H.diagonal().mean()))


def test_power_iteration_of_white_and_empty_matrices():
    assert power_iteration(torch.eye(5) * 3) == pytest.approx(3)
    assert power_iteration(torch.zeros(5, 5)) == 0


@pytest.mark.parametrize("sink", [0, 1e4])
def test_the_damp_that_is_foretold_is_enough_in_float32(sink):
    H = hessian_of(rows(256, 512, sink=sink))
    needed = spectrum(H, 256).damp_needed
    assert needed == pytest.approx(6e-7 * spectrum(H, 256).lambda_ratio)
    assert factorise(H, max(needed, 1e-5))[1] == 0
    assert needed > 2e-4 if sink else needed < 1e-4


def test_one_factorization_gives_the_factor_of_three():
    H = hessian_of(rows(400, 96, sink=5), torch.float64)
    U, info = factorise(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    usual = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    assert info == 0 and torch.equal(U, U.triu())
    assert (U - usual).abs().max() / usual.abs().max() <= 1e-12


def test_dead_columns_are_decoupled_from_the_factor():
    H = hessian_of(torch.cat([rows(200, 24), torch.zeros(200, 8)], 1), torch.float64)
    U, info = factorise(H, 0.01)
    alone, _ = factorise(H[:24, :24], 0.01)
    assert info == 0 and not (U[:24, 24:] != 0).any()
    assert (U[:24, :24] - alone).abs().max() <= 1e-12


def test_a_minor_that_is_not_positive_is_counted_from_the_end():
    H = torch.eye(6)
    H[1, 1] = 1
    H[0, 1] = H[1, 0] = 2  # indefinite in the last two of the reversed order
    assert factorise(H, 0.0) == (None, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_stops_the_ladder_at_its_first_rung(value):
    H = hessian_of(rows(64, 16))
    H[3, 9] = H[9, 3] = value
    U, attempts = factorise_with_escalation(H, 0.01, 1.0)
    assert U is None
    assert [(a.damp, a.precision, a.outcome) for a in attempts] == [(0.01, "float32", "non-finite")]


def test_a_good_hessian_takes_one_attempt():
    H = hessian_of(rows(512, 64))
    U, attempts = factorise_with_escalation(H, 0.01, 0.1)
    assert [(a.damp, a.precision, a.outcome, a.info) for a in attempts] == [(0.01, "float32", "ok", 0)]
    assert U.dtype == torch.float32 and torch.isfinite(U).all()


def test_float64_is_tried_before_more_damping():
    H = hessian_of(rows(256, 512, sink=1e4))
    U, attempts = factorise_with_escalation(H, 3e-6, 0.1)
    assert attempts[0].outcome == "not-positive" and attempts[0].precision == "float32"
    assert attempts[1].damp == 3e-6 and attempts[1].precision == "float64"
    assert attempts[-1].outcome == "ok" and U is not None
    assert all(a.damp <= 0.1 for a in attempts)


def test_the_ladder_climbs_in_order_and_never_past_damp_max():
    H = torch.eye(40)
    H[0, 0] = 1
    H[0, 1] = H[1, 0] = 1.9  # least eigenvalue -0.9: only repair or damp 1 helps
    U, attempts = factorise_with_escalation(H, 0.01, 0.1)
    assert [(a.damp, a.precision) for a in attempts] == [
        (0.01, "float32"),
        (0.01, "float64"),
        (0.02, "float64"),
        (0.05, "float64"),
        (0.1, "float64"),
        (0.01, "eigen"),
    ]
    assert [a.outcome for a in attempts] == ["not-positive"] * 5 + ["ok"]
    values = torch.linalg.eigvalsh(torch.linalg.inv(U.double().T @ U.double()))
    assert values.min().item() == pytest.approx(0.01, rel=1e-3)


def test_no_factor_is_an_answer_with_every_attempt():
    H = -torch.eye(4) + 3 * torch.ones(4, 4)
    H.fill_diagonal_(1.0)
    H[0, 1] = H[1, 0] = 1e6
    U, attempts = factorise_with_escalation(H, 0.0, 0.0)  # damp 0 leaves no room: no repair, no rung
    assert U is None
    assert [(a.damp, a.precision, a.outcome) for a in attempts] == [
        (0.0, "float32", "not-positive"),
        (0.0, "float64", "not-positive"),
    ]


def test_products_are_exact_inside_and_as_before_outside():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_empty_calibration_is_all_dead():
    facts = spectrum(Hessian(6).take(), 0)
    assert (facts.dead, facts.rank_bound, facts.mean_diag, facts.lambda_max) == (6, 0, 0.0, 0.0)
    assert math.isnan(facts.damp_needed) and facts.condition == math.inf and facts.finite
