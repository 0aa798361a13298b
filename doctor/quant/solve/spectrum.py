"""What is known of a Hessian before it is factored: dead columns, mean diagonal, largest eigenvalue, the damping it
will need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from doctor.core.recipe import DAMP
from doctor.quant.solve.numerics import live_mean
from doctor.quant.solve.square import Square

# A damp of 2e-7 to 6e-7 of lambda_max / mean diag(H) was the least that passed in float32, for widths 512 to 4096 and a
# dominant direction (lambda_max about k times the mean). The upper edge, so that below it a failure is no surprise.
FLOAT32_DAMP_PER_LAMBDA = 6e-7


@dataclass(frozen=True)
class Spectrum:
    """Facts of H before it is factored. Columns are in_features; diag and lambda in units of H."""

    columns: int
    rows: int
    dead: int  # columns with diag(H) = 0: never active in calibration
    rank_bound: int  # min(rows, live columns)
    mean_diag: float  # over live columns
    max_diag: float
    lambda_max: float  # by power iteration: a lower bound, within a percent where one direction dominates
    damp_needed: float  # least damp expected to pass in float32; an upper edge
    condition: float  # (lambda_max + damp * mean_diag) / (lambda_min + damp * mean_diag), lambda_min taken as 0
    finite: bool

    @property
    def lambda_ratio(self) -> float:
        """lambda_max / mean_diag: 1 for white inputs, the number of columns for a single direction."""
        return self.lambda_max / self.mean_diag if self.mean_diag > 0 else math.nan


def dead_columns(H: torch.Tensor | Square) -> torch.Tensor:
    """bool[k]: columns without any energy in calibration. NaN is not dead."""
    return H.diagonal() <= 0


def spectrum(H: torch.Tensor | Square, rows: int, damp: float = DAMP) -> Spectrum:
    """Facts of H[k, k] that foretell how factoring will go. `damp` enters the condition estimate only."""
    H = Square.of(H)
    columns = len(H)
    if not H.finite():
        nan = math.nan
        return Spectrum(columns, rows, 0, 0, nan, nan, nan, nan, nan, finite=False)
    dead = int(dead_columns(H).sum())
    mean, largest = live_mean(H), power_iteration(H)
    ratio = largest / mean if mean > 0 else math.nan
    floor = damp * mean
    return Spectrum(
        columns,
        rows,
        dead,
        min(rows, columns - dead),
        mean,
        float(H.diagonal().max()),
        largest,
        FLOAT32_DAMP_PER_LAMBDA * ratio,
        (largest + floor) / floor if floor > 0 else math.inf,
        True,
    )


def power_iteration(H: torch.Tensor | Square, steps: int = 20) -> float:
    """Largest eigenvalue of a positive semidefinite H[k, k], from below. The start favours no direction by chance:

    it is the column of H with the largest diagonal, so equal input gives equal output.
    """
    H = Square.of(H)
    vector = H.column(int(H.diagonal().argmax())).to(torch.float64)
    value = 0.0
    for _ in range(steps):
        norm = float(vector.norm())
        if not norm > 0:
            return value
        vector = vector / norm
        single = vector.to(torch.float32)
        product = H.product(single[None])[0].to(torch.float64)
        value, vector = float(vector @ product), product
    return value
