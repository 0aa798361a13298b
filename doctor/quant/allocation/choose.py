"""The choice of a width for every unit under a budget: least predicted divergence for the bits that may be spent.

A unit is the linears that an engine stores as one matrix, so they share a width. The problem separates: for a price a
bit, every unit takes its own best option, and the price is sought at which the budget is met. Only options on the
lower convex hull of (size, hurt) are ever taken so; what the last step leaves over is then spent where a bit helps
most. The result is within one unit's step of the best, the same in every run, and takes milliseconds.

Source: Shoham & Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers, IEEE TASSP 36 (9).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from doctor.core.errors import DoctorError
from doctor.core.messages import _


@dataclass(frozen=True)
class Option:
    """One way to store a unit. width: as Recipe.width has it. size: bits of everything it stores. hurt: predicted KL in
    nats a token.
    """

    width: float
    size: int
    hurt: float


Unit = tuple[str, ...]  # names of the linears that share a width
Chosen = dict[Unit, Option]


def choose(options: Mapping[Unit, Sequence[Option]], budget: int) -> Chosen:
    """An option for every unit, of `budget` bits together at most. Raises DoctorError where the smallest are more."""
    hulls = {unit: lower_hull(found) for unit, found in options.items()}
    chosen = {unit: hull[0] for unit, hull in hulls.items()}
    least = total(chosen)
    if budget < least:
        raise DoctorError(
            _("budget of {budget:,} bits: the smallest options take {least:,}.", budget=budget, least=least),
            _("Raise it, or allow smaller schemes."),
        )
    # Along a hull each further bit helps less, so taking all steps by their gain a bit is the search for the price.
    steps = [
        ((low.hurt - high.hurt) / (high.size - low.size), unit, high)
        for unit, hull in hulls.items()
        for low, high in pairwise(hull)
    ]
    left, closed = budget - least, set()
    for _gain, unit, option in sorted(steps, key=lambda step: (-step[0], step[1])):
        more = option.size - chosen[unit].size
        if unit in closed:
            continue
        if more > left:
            closed.add(unit)  # a later step of this unit builds on this one
            continue
        chosen[unit], left = option, left - more
    return spent(options, chosen, left)


def spent(options: Mapping[Unit, Sequence[Option]], chosen: Chosen, left: int) -> Chosen:
    """The choice after what is left was spent on any option, on a hull or not, that still fits and helps most a bit."""
    chosen = dict(chosen)
    while True:
        found = [
            ((chosen[unit].hurt - option.hurt) / max(more, 1), unit, option, more)
            for unit, offered in options.items()
            for option in offered
            if option.hurt < chosen[unit].hurt and (more := option.size - chosen[unit].size) <= left
        ]
        if not found:
            return chosen
        _gain, unit, option, more = max(found, key=lambda step: (step[0], step[1]))
        chosen[unit], left = option, left - more


def lower_hull(options: Iterable[Option]) -> list[Option]:
    """Those that are the best at some price a bit: larger ones hurt less, and each further bit helps less."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.size, o.hurt)):
        if found and not option.hurt < found[-1].hurt:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _slope(low: Option, high: Option) -> float:
    """What a bit takes from the hurt."""
    return (low.hurt - high.hurt) / (high.size - low.size)


def total(chosen: Mapping[Unit, Option]) -> int:
    """Bits of a choice."""
    return sum(option.size for option in chosen.values())


def hurt(chosen: Mapping[Unit, Option]) -> float:
    """Predicted KL of a choice, in nats a token."""
    return sum(option.hurt for option in chosen.values())
