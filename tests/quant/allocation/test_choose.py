"""The choice of widths under a budget."""

import itertools
import random

import pytest

from doctor.core.errors import DoctorError
from doctor.quant.allocation.choose import Option, choose, hurt, lower_hull, total


def problem(seed, units=5, convex=True):
    """Units of three to five options, whose hurts fall as quantizing makes them fall, or at random."""
    rng = random.Random(seed)
    found = {}
    for unit in range(units):
        weights, scale = rng.choice([10, 20, 70]), 10 ** rng.uniform(-3, 0)
        widths = sorted(rng.sample(range(2, 9), rng.randrange(3, 6)))
        hurts = [scale * 4.0**-b if convex else rng.random() for b in widths]
        found[(f"unit{unit}",)] = [Option(b, weights * b, h) for b, h in zip(widths, hurts, strict=True)]
    return found


def best(options, budget):
    """Least hurt of all choices."""
    return min(
        sum(o.hurt for o in choice)
        for choice in itertools.product(*options.values())
        if sum(o.size for o in choice) <= budget
    )


@pytest.mark.parametrize("convex", [True, False])
def test_a_choice_keeps_the_budget_and_is_within_one_step_of_the_best(convex):
    for seed in range(60):
        options = problem(seed, convex=convex)
        least = sum(min(o.size for o in found) for found in options.values())
        most = sum(max(o.size for o in found) for found in options.values())
        budget = least + (most - least) * (seed % 10) // 10
        chosen = choose(options, budget)
        assert chosen.keys() == options.keys() and total(chosen) <= budget
        # Lagrange's choice is the best for the bits that it takes; a step more would be beyond the budget.
        step = max(o.size for found in options.values() for o in found)
        assert hurt(chosen) <= best(options, max(least, budget - step)) + 1e-12
        assert hurt(chosen) >= best(options, budget) - 1e-12


def test_an_option_that_is_larger_and_no_better_is_on_no_hull():
    options = [Option(2, 20, 1.0), Option(3, 30, 1.0), Option(4, 40, 0.1), Option(6, 60, 0.09), Option(8, 80, 0.0)]
    assert [o.width for o in lower_hull(options)] == [2, 4, 8]


def test_a_larger_budget_never_hurts_more():
    options = problem(7, units=12)
    least = sum(min(o.size for o in found) for found in options.values())
    hurts = [hurt(choose(options, least + more)) for more in range(0, 1500, 50)]
    assert hurts == sorted(hurts, reverse=True) and hurts[0] > hurts[-1]


def test_the_same_problem_gets_the_same_choice_in_any_order():
    options = problem(3, units=8)
    turned = dict(reversed(options.items()))
    assert choose(options, 1500) == choose(turned, 1500)


def test_a_budget_below_the_smallest_options_is_refused_with_both_figures():
    options = {("a",): [Option(3, 300, 1.0), Option(4, 400, 0.5)]}
    with pytest.raises(DoctorError, match="budget of 299 bits: the smallest options take 300"):
        choose(options, 299)
