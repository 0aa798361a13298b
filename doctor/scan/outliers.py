"""Channels far above their neighbours: a column of a linear, an entry of a norm's weights.

A column shares the scale of its group with its neighbours, so what counts is its size against theirs. Every row shows
it: a sample of rows finds it, and two halves of the sample tell a column from a single large weight.
"""

from __future__ import annotations

from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.core.lazy_numpy import np
from doctor.scan import counters
from doctor.scan.stats import Outlier, Stats

FIRST_ROWS, SAMPLE_ROWS = 16, 64
# A largest magnitude against the root mean square of a chunk: m columns of k that are a hundred times the rest have
# sqrt(k / m) or more, trained weights 7 to 40. Below the larger limit no rows are sampled; four such columns are above.
PEAK, PEAK_BY_WIDTH = 5.0, 0.5
ABOVE_MEAN = 8.0  # a column against the mean of all columns in the first rows; normal weights have 1.5
ENTRY_PEAK = 6.0  # an entry of a norm against the root mean square of all


def column(part: memoryview, dtype: str, columns: int, counted: Stats) -> Outlier | None:
    """The column of a chunk [rows, columns] that is largest against the median column, both as their largest magnitudes
    in the first rows; None where a look at the counters of the chunk and at a few rows shows none far above the rest.

    A column counts with the smaller of its magnitudes in two halves of the sample.
    """
    rows = counted.numel // columns
    peak = max(PEAK, PEAK_BY_WIDTH * columns**0.5)
    if rows < 2 or not counted.absmax**2 * counted.numel > peak**2 * counted.sumsq:
        return None
    width = len(part) // rows
    first = counters.row_col_absmax(part[: min(FIRST_ROWS, rows) * width], dtype, columns)[1]
    if not first.max() > ABOVE_MEAN * first.mean():
        return None
    size = min(rows, SAMPLE_ROWS) // 2 * width
    halves = [counters.row_col_absmax(part[at : at + size], dtype, columns)[1] for at in (0, size)]
    return _largest(np.minimum(*halves))


def entry(part: memoryview, dtype: str, norm: str, counted: Stats) -> Outlier | None:
    """The entry of a norm's weights that is largest against the median one; None where the counters show none far above
    the rest. norm: as ModelSpec.norm_of says it.
    """
    if not counted.absmax**2 * counted.numel > ENTRY_PEAK**2 * counted.sumsq:
        return None
    values = from_codes(np.frombuffer(part, CODE_NUMPY[dtype]), dtype).astype(np.float64)
    return _largest(np.abs(values + 1 if norm.startswith("(1 +") else values))


def _largest(magnitudes: np.ndarray) -> Outlier | None:
    """None where that is not finite or the median is 0: other rules judge those."""
    middle = magnitudes.size // 2
    at, median = (
        int(np.argmax(magnitudes)),
        float(np.partition(magnitudes, middle)[middle]),
    )  # a third of np.median's time
    times = float(magnitudes[at]) / median if median > 0 else float("inf")
    return Outlier(at, times) if np.isfinite(times) else None
