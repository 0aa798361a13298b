import math

import pytest
import torch

from doctor.evaluate.scores import Tally, longest_run


def tally(a, b, targets):
    t = Tally()
    t.add(a, b, targets)
    return t


def test_a_model_against_itself_has_no_divergence_and_its_own_perplexity():
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 50, (600,), generator=torch.Generator().manual_seed(2))
    t = tally(logits, logits, targets)
    want = math.exp(torch.nn.functional.cross_entropy(logits.double(), targets).item())
    assert t.perplexity(0) == t.perplexity(1) == pytest.approx(want, rel=1e-6)
    assert t.divergence() == (0.0, 0.0) and t.agreement() == 1.0


def test_divergence_is_kullback_leibler_of_the_original_from_the_quantized():
    a, b = torch.randn(3, 7), torch.randn(3, 7)
    p, q = torch.softmax(a.double(), 1), torch.softmax(b.double(), 1)
    assert tally(a, b, torch.zeros(3, dtype=torch.long)).divergence()[0] == pytest.approx(
        float((p * (p / q).log()).sum(1).mean()), rel=1e-5
    )


def test_a_row_that_is_not_finite_is_counted_and_never_averaged_away():
    a = torch.zeros(4, 5)
    b = a.clone()
    b[1, 2], b[3, 0] = float("nan"), float("inf")
    t = tally(a, b, torch.zeros(4, dtype=torch.long))
    assert t.nonfinite == [0, 2] and t.perplexity(0) == pytest.approx(5) and math.isnan(t.perplexity(1))
    assert t.compared == 2
    assert math.isnan(tally(a * float("nan"), b, torch.zeros(4, dtype=torch.long)).divergence()[0])


def test_padded_vocabularies_are_compared_where_both_have_columns():
    a = torch.randn(4, 5)
    t = tally(a, torch.cat([a, torch.full((4, 3), 99.0)], 1), torch.zeros(4, dtype=torch.long))
    assert t.divergence()[0] == 0 and t.agreement() == 1


def test_entropy_is_that_of_the_definition_and_of_finite_rows_only():
    a = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    b = a.clone()
    b[2, 0] = float("nan")
    p = torch.softmax(a.double(), 1)
    each = -(p * p.log()).sum(1)
    t = tally(a, b, torch.zeros(5, dtype=torch.long))
    assert t.entropy(0) == pytest.approx(float(each.mean()), rel=1e-6)
    assert t.entropy(1) == pytest.approx(float(each[[0, 1, 3, 4]].mean()), rel=1e-6)
    assert math.isnan(tally(a, a * float("nan"), torch.zeros(5, dtype=torch.long)).entropy(1))


def test_a_distribution_with_one_certain_token_has_no_entropy_and_no_nan():
    a = torch.zeros(2, 4)
    a[:, 1] = 1e4
    t = tally(a, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    assert t.entropy(0) == 0 and t.entropy(1) == pytest.approx(math.log(4))


def test_the_favourite_is_the_token_that_is_first_most_often():
    a = torch.zeros(4, 3)
    a[[0, 1, 2], 2], a[3, 1] = 1.0, 1.0
    t = tally(a, a, torch.zeros(4, dtype=torch.long))
    assert t.one_choice(0) == (2, 0.75)
    assert math.isnan(tally(a * float("nan"), a, torch.zeros(4, dtype=torch.long)).one_choice(0)[1])


def test_longest_run():
    assert [longest_run(x) for x in ([], [1], [1, 1, 2, 2, 2], [0] * 9)] == [0, 1, 3, 9]
