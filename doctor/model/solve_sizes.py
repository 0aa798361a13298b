"""Config values that make shape expressions come out as the tensors' sizes."""

from dataclasses import replace

from doctor.model.expressions import evaluate
from doctor.model.spec import ModelSpec


def assume(spec: ModelSpec, **values: int):
    """spec.lookup as it would answer if config.json held these values."""
    return replace(spec, config={**spec.config, **values}).lookup


def solve(expression: str, key: str, spec: ModelSpec, want: int) -> int | None:
    """The value of one config key that makes a shape expression come out as `want`; None where no whole number does.

    Every expression is linear in each of its keys, up to one floor division by 2, so the divisors of 2 * want are
    enough to try.
    """
    tried = set()
    for divisor in range(1, min(want, 1024) + 1):
        for value in (want // divisor, divisor, 2 * want // divisor):
            if value not in tried and evaluate(expression, assume(spec, **{key: value})) == want:
                return value
            tried.add(value)
    return None
