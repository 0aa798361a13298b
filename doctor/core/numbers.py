"""What counts as a number in a stranger's JSON."""

import math
from typing import Any


def is_finite(value: Any) -> bool:
    """Whether a value is a number, no bool, that a float can hold: JSON has integers that are larger than any float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
