"""How far a comparison's figures would move with other rows, and the tail of the divergence."""

import math

import pytest
import torch

from doctor.evaluate.scores import Tally
from doctor.report.closeness import closeness


def tally(rows, seed=0, noise=0.3, length=40):
    draw = torch.Generator().manual_seed(seed)
    found = Tally()
    for _row in range(rows):
        logits = torch.randn(length, 50, generator=draw)
        other = logits + noise * torch.randn(length, 50, generator=draw)
        found.add(logits, other, torch.randint(0, 50, (length,), generator=draw))
    return found


def test_the_tail_is_the_quantile_of_every_position():
    found = tally(6)
    values = torch.cat(found.kl).double()
    for share in (0.5, 0.99, 0.999, 1.0):
        assert found.kl_at(share) == pytest.approx(float(values.quantile(share)), rel=1e-9)
    assert found.divergence() == (pytest.approx(float(values.mean())), found.kl_at(0.99))
    assert math.isnan(Tally().kl_at(0.5)) and all(map(math.isnan, Tally().divergence()))


def test_the_span_holds_the_figure_and_narrows_with_more_rows():
    few, many = tally(6), tally(60)
    for found in (few, many):
        spread = found.spread()
        ratio = found.perplexity(1) / found.perplexity(0)
        assert spread.ratio[0] < ratio < spread.ratio[1]
        assert spread.kl[0] < found.divergence()[0] < spread.kl[1]
        assert spread.top1[0] <= found.agreement() <= spread.top1[1]
    assert many.spread().kl[1] - many.spread().kl[0] < few.spread().kl[1] - few.spread().kl[0]
    assert few.spread() == tally(6).spread()  # drawn by a seed of its own


def test_the_span_covers_the_true_mean_as_often_as_it_says():
    truth = tally(600, seed=99).divergence()[0]
    inside = sum(low <= truth <= high for low, high in (tally(24, seed=s).spread().kl for s in range(40)))
    assert inside >= 34  # 38 of 40 are expected


def test_two_rows_or_a_non_finite_one_give_no_span():
    assert all(map(math.isnan, tally(2).spread().kl))
    broken = tally(4)
    broken.add(torch.randn(3, 50), torch.full((3, 50), math.nan), torch.zeros(3, dtype=torch.long))
    assert all(map(math.isnan, broken.spread().ratio))


@pytest.mark.parametrize(
    "after, span, words",
    [
        (11.47, (math.nan, math.nan), "perplexity +14.7% against its original: q4"),
        (10.1, (math.nan, math.nan), "agrees with its original: q4"),
        (10.1, (1.0, 1.015), "agrees with its original: q4"),
        (10.1, (0.97, 1.05), "perplexity +1.0% against its original: q4"),  # so few rows do not show that it agrees
        (9.0, (0.88, 0.92), "perplexity -10.0% against its original: q4"),
        (math.nan, (math.nan, math.nan), "compared with its original: q4"),
    ],
)
def test_a_model_agrees_only_where_perplexity_can_hardly_have_risen(after, span, words):
    compared = {"perplexity_original": 10.0, "perplexity_quantized": after, "ratio_span": span}
    assert closeness(compared, "q4") == words
