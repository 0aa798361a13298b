"""Columns and norm entries a hundred times their neighbours: what is measured, and what is not taken for one."""

import numpy as np
import pytest

from doctor.lint.testing import encode
from doctor.scan import counters, outliers


def largest(values, dtype="BF16"):
    raw = encode(values, dtype).tobytes()
    return outliers.column(memoryview(raw), dtype, values.shape[1], counters.scan(raw, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("columns", [64, 576, 4096])
def test_a_column_far_above_the_rest_is_found_at_its_place(columns, dtype):
    values = np.random.default_rng(1).normal(0, 0.02, (128, columns))
    values[:, 11] *= 128
    found = largest(values, dtype)
    assert found.place == 11 and 80 < found.times < 160


def test_a_few_columns_are_found_too_and_trained_weights_are_not_sampled(monkeypatch):
    values = np.random.default_rng(1).normal(0, 0.02, (128, 4096))
    looked = []
    monkeypatch.setattr(outliers.counters, "row_col_absmax", lambda *a: looked.append(a))
    assert largest(values) is None and not looked
    monkeypatch.undo()
    values[:, ::200] *= 128
    assert largest(values).times > 80


def test_one_large_weight_is_no_column():
    values = np.random.default_rng(1).normal(0, 0.02, (128, 512))
    values[3, 11] = 100
    assert not (found := largest(values)) or found.times < 3


def test_what_is_not_finite_or_zero_is_left_to_other_rules():
    values = np.random.default_rng(1).normal(0, 0.02, (128, 64))
    values[:, 11] = np.nan
    assert largest(values) is None
    assert largest(np.zeros((128, 64))) is None


def test_norms_that_add_one_are_judged_by_their_sum():
    values = np.zeros(64)
    values[9] = 127
    raw = encode(values, "BF16").tobytes()
    found = outliers.entry(memoryview(raw), "BF16", "(1 + weight) * xhat", counters.scan(raw, "BF16"))
    assert found == outliers.Outlier(9, 128.0)
    assert outliers.entry(memoryview(raw), "BF16", "weight * xhat", counters.scan(raw, "BF16")) is None
