"""The Hessian of a linear: taken from calibration rows, judged by its spectrum, factored with the least damping.

Rows of the output error (W - Q) X^T have the quadratic form H = 2/n X^T X, shared by every row of W and by every
linear that reads the same input. H is positive semidefinite with rank at most the number of rows, so a factor needs
damping; how much is set by rounding, not by rank: with few rows and a plain spectrum 1e-5 of mean diag(H) was enough,
while one dominant direction (a sink token) raises it with the width.

What is not finite is never repaired here. It is recorded where it first appears (which calibration row, which
channel), stays in H, and stops the factor: more damping cannot cure NaN, and a NaN factor may come back from
LAPACK with info = 0.

Sources: Frantar et al. 2022 (arXiv 2210.17323); Higham, Accuracy and Stability of Numerical Algorithms, thm 10.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk
from scipy.linalg.lapack import dpotrf, dtrtri, spotrf, strtri

from doctor.core.recipe import DAMP
from doctor.quant.solve import cpu

# A damp of 2e-7 to 6e-7 of lambda_max / mean diag(H) was the least that passed in float32, for widths 512 to 4096 and a
# dominant direction (lambda_max about k times the mean). The upper edge, so that below it a failure is no surprise.
FLOAT32_DAMP_PER_LAMBDA = 6e-7
# Rungs between damp and damp_max. Past 0.1 the result leans to RTN, so the eigenvalue repair comes first.
DAMP_RUNGS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GENTLE_DAMP = 0.1
EIGEN_LIMIT = 8192  # eigh in float64 takes minutes above, on a CPU
_ROWS_AT_A_TIME = 8192
_PANEL = 256  # rows of H that are worked on at a time where a second H would be held else


@dataclass(frozen=True)
class NonFinite:
    """The first non-finite calibration value: its row counted from the first batch, its channel, and how many there
    are.
    """

    row: int
    channel: int
    count: int


@dataclass(frozen=True)
class Spectrum:
    """What H tells before it is factored. Columns are in_features; diag and lambda in units of H."""

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


@dataclass(frozen=True)
class Attempt:
    """One try to factor H. outcome: ok, not-positive (info is the order of the minor) or non-finite."""

    damp: float
    precision: str  # float32, float64, eigen
    outcome: str
    info: int = 0


class Hessian:
    """Accumulates H = 2/n X^T X over batches of calibration rows.

    float32 sums are enough for rows of bf16 activations; float64 gives the last digits that float32 loses with a
    dominant direction (least damp 1e-3 -> 1e-7 at k = 2048), which casting a finished float32 H does not.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.columns = columns
        self.rows = 0
        self._nonfinite: NonFinite | None = None
        self._scan = _scan_on(torch.device(device)) if dtype == torch.float32 else None
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        # On a CPU BLAS computes the half that is not its mirror image: 1.6 times faster than a full product.
        self._syrk = {torch.float32: ssyrk, torch.float64: dsyrk}.get(dtype) if self._sum.device.type == "cpu" else None
        self._mixed = dtype == torch.float32 and mixed_products(self._sum.device)

    def add(self, X: torch.Tensor) -> None:
        """Adds the rows of X[..., k], any float dtype. The first non-finite value is kept in `nonfinite`, and in H."""
        X = X.reshape(-1, self.columns)
        if self._scan is not None:
            self._scan.add(X.to(self._sum.device, torch.float32 if X.dtype == torch.float64 else X.dtype))
        else:
            self._look_for_nonfinite(X)
        with exact_products():
            for part in X.split(_ROWS_AT_A_TIME):
                part = part.to(self._sum.device)
                if self._mixed and part.dtype in (torch.bfloat16, torch.float16):
                    self._sum += torch.mm(part.T, part, out_dtype=torch.float32)
                    continue
                part = part.to(self._sum.dtype)
                if self._syrk:
                    # Transposed views are in Fortran's order, so nothing is copied and the lower half of _sum is
                    # written. Not part.numpy(), which would keep a halted pass from putting it away (shelf.py).
                    self._syrk(1.0, np.from_dlpack(part.contiguous()).T, beta=1.0, c=self._sum.numpy().T, overwrite_c=1)
                else:
                    self._sum.addmm_(part.T, part)
        self.rows += X.shape[0]

    def take(self) -> torch.Tensor:
        """H [k, k], exactly symmetric, in the dtype of the sums, whose memory it takes: nothing can be added any more.

        All zeros before the first row.
        """
        H, self._sum = self._sum.mul_(2 / max(1, self.rows)), None
        for at in range(0, self.columns, _PANEL):
            end = at + _PANEL
            square, beside, below = H[at:end, at:end], H[at:end, end:], H[end:, at:end]
            if self._syrk:
                square.tril_().add_(square.tril(-1).T)
            else:
                square.copy_((square + square.T) / 2)
                below.add_(beside.T).mul_(0.5)
            beside.copy_(below.T)
        return H

    @property
    def nonfinite(self) -> NonFinite | None:
        """The first value that is not finite. On a device this waits for the batches so far, which adding them does
        not.
        """
        if self._scan is not None and self._scan.numel:
            found = self._scan.read()
            count = found["n_nan"] + found["n_inf"]
            return NonFinite(*divmod(found["first_nonfinite"], self.columns), count) if count else None
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, value: NonFinite | None) -> None:
        self._nonfinite, self._scan = value, None

    def _look_for_nonfinite(self, X: torch.Tensor) -> None:
        if all_finite(X):
            return
        bad = ~torch.isfinite(X)
        count = int(bad.sum())
        first = self._nonfinite
        if first is None:
            row, channel = divmod(int(bad.flatten().to(torch.uint8).argmax()), self.columns)
            self._nonfinite = NonFinite(self.rows + row, channel, count)
        else:
            self._nonfinite = NonFinite(first.row, first.channel, first.count + count)


def _scan_on(device: torch.device):
    """A kernels.Scan, which counts without waiting for the device; None where no kernel runs."""
    if device.type != "cuda":
        return None
    from doctor.quant.solve import kernels  # kernels.py needs grid.py, which needs this file

    return kernels.Scan(device) if kernels.available(device) is None else None


@cache
def mixed_products(device: torch.device) -> bool:
    """Whether this torch multiplies 16-bit floats to float32 on the device: exact products, float32 sums, ten times the
    speed.
    """
    if device.type != "cuda":
        return False
    one = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        return bool((torch.mm(one, one, out_dtype=torch.float32) == 16).all())
    except (TypeError, RuntimeError):  # torch before 2.8 does not know the argument
        return False


@contextmanager
def exact_products() -> Iterator[None]:
    """float32 products in float32: TF32 in a product that feeds H or the error feedback costs what calibration
    gains.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def live_mean(H: torch.Tensor) -> float:
    """mean of diag(H) over live columns; 0.0 when all are dead.

    Dead columns do not count: zero padding would lower the mean, hence the damping, hence change the codes of columns
    that padding did not touch.
    """
    diagonal = H.diagonal().to(torch.float64)
    live = diagonal > 0
    return float(diagonal[live].mean()) if live.any() else 0.0


def dead_columns(H: torch.Tensor) -> torch.Tensor:
    """bool[k]: columns without any energy in calibration. NaN is not dead."""
    return H.diagonal() <= 0


def spectrum(H: torch.Tensor, rows: int, damp: float = DAMP) -> Spectrum:
    """Facts of H[k, k] that foretell how factoring will go. `damp` enters the condition estimate only."""
    columns = H.shape[0]
    if not all_finite(H):
        return Spectrum(columns, rows, 0, 0, *[math.nan] * 5, finite=False)
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


def power_iteration(H: torch.Tensor, steps: int = 20) -> float:
    """Largest eigenvalue of a positive semidefinite H[k, k], from below. The start favours no direction by chance:

    it is the column of H with the largest diagonal, so equal input gives equal output.
    """
    vector = H[:, int(H.diagonal().argmax())].to(torch.float64)
    value = 0.0
    for _ in range(steps):
        norm = float(vector.norm())
        if not norm > 0:
            return value
        vector = vector / norm
        product = (H @ vector.to(H.dtype)).to(torch.float64)
        value, vector = float(vector @ product), product
    return value


def factorise(H: torch.Tensor, damp: float, mean: float | None = None) -> tuple[torch.Tensor | None, int]:
    """(U, info): U upper triangular with (H + damp * mean * I)^-1 = U^T U, and why there is none, as in
    reversed_factor.

    One factorization instead of three: with J the reversal of order, J H J = L L^T gives U = J L^-1 J, so there is one
    place that can fail, and 2/3 k^3 operations instead of 4/3.
    """
    L, info = reversed_factor(H, damp, mean)
    if L is None:
        return None, info
    inverse, info = _inverse_of_triangle(L)
    if inverse is None:
        return None, info
    U = inverse.flip(0, 1).contiguous()
    return (U, 0) if all_finite(U) else (None, -1)


def reversed_factor(
    H: torch.Tensor, damp: float, mean: float | None = None, order: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, int]:
    """(L, info): L lower triangular with L L^T = H + damp * mean * I in reversed `order` (i64[k]; None: as it is), and
    why there is none.

    H [k, k] in float32 or float64, which is the precision of the work; mean is the mean diagonal that damp is a share
    of (default: over live columns). Dead columns stand in with the mean, which decouples them from the others.

    info = 0: L is good. info = j > 0: the leading minor of order j of the *reversed* matrix is not positive; j is near
    the rank when calibration rows are few but moves with rounding, so it is evidence and never part of a message.
    info = -1: H or L is not finite. Finite is tested on both sides of the call because LAPACK does not (spotrf of a
    matrix with one NaN returns info = 0 and a NaN factor: SciPy 1.17, OpenBLAS). A caller must not retry on -1.
    """
    if not all_finite(H):
        return None, -1
    mean = live_mean(H) if mean is None else mean
    damped = _reversed(H, order)
    diagonal = damped.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal, torch.full_like(diagonal, mean if mean > 0 else 1.0)))
    diagonal.add_(damp * mean)
    L, info = _lower_factor(damped)
    return (L, info) if L is None or all_finite(L) else (None, -1)


def _reversed(H: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """H in reversed order, contiguous; above the diagonal it may hold anything."""
    if order is None and not cpu.usable(H):
        return H.flip(0, 1).contiguous()
    order = torch.arange(len(H) - 1, -1, -1) if order is None else order.flip(0)
    if cpu.usable(H):
        return cpu.arrange(H.contiguous(), order.to(torch.int32))
    return H.index_select(0, order).index_select(1, order)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, in one pass: both reach the bounds."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _lower_factor(A: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """(L of A = L L^T, info); the lower triangle of A [k, k] is read, all of it overwritten.

    In Fortran's order A^T lies where A lies, so the upper factor R of A^T is L^T and nothing is copied.
    """
    routine = {torch.float32: spotrf, torch.float64: dpotrf}.get(A.dtype)
    if A.device.type == "cpu" and routine:
        R, info = routine(A.numpy().T, lower=0, overwrite_a=1, clean=1)
        return (None, int(info)) if info else (torch.from_numpy(R.T), 0)
    L, info = torch.linalg.cholesky_ex(A)
    return (None, int(info)) if int(info) else (L, 0)


def _inverse_of_triangle(L: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """(L^-1, info); L [k, k] is overwritten.

    On a CPU LAPACK inverts the triangle itself, a third of what solving against the identity costs.
    """
    routine = {torch.float32: strtri, torch.float64: dtrtri}.get(L.dtype)
    if L.device.type == "cpu" and routine:
        R, info = routine(L.numpy().T, lower=0, overwrite_c=1)
        return (None, int(info)) if info else (torch.from_numpy(R.T), 0)
    return torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False), 0


def factorise_with_escalation(
    H: torch.Tensor,
    damp: float,
    damp_max: float,
    mean: float | None = None,
    factor: Callable[..., tuple[torch.Tensor | None, int]] = factorise,
) -> tuple[torch.Tensor | None, list[Attempt]]:
    """(the factor in the dtype of H, attempts): the first that succeeds of factor(H, damp, mean), and every try before
    it as data.

    In order of what each costs in quality: float32 at damp; float64 at damp (same problem, more digits); more damping
    up to 0.1, each rung no higher than damp_max; eigenvalues of H clamped from below at damp; more damping up to
    damp_max. The factor is None when all failed: the caller quantizes without feedback (RTN) and says so. A non-finite
    H ends the ladder at its first rung, since no damping makes NaN finite.
    """
    attempts: list[Attempt] = []
    mean = live_mean(H) if mean is None else mean
    for precision, share in _rungs(H, damp, damp_max):
        if precision == "eigen":
            matrix, share_added = _clamp_eigenvalues(H.to(torch.float64), share * mean), 0.0
        else:
            matrix, share_added = H.to(getattr(torch, precision)), share
        U, info = factor(matrix, share_added, mean)
        outcome = "ok" if info == 0 else "non-finite" if info < 0 else "not-positive"
        attempts.append(Attempt(share, precision, outcome, info))
        if info <= 0:
            return (None if U is None else U.to(H.dtype)), attempts
    return None, attempts


def _rungs(H: torch.Tensor, damp: float, damp_max: float) -> Iterator[tuple[str, float]]:
    higher = sorted({rung for rung in (*DAMP_RUNGS, damp_max) if damp < rung <= damp_max})
    if H.dtype == torch.float32:
        yield "float32", damp
    yield "float64", damp
    yield from (("float64", share) for share in higher if share <= GENTLE_DAMP)
    if H.shape[0] <= EIGEN_LIMIT and damp > 0:
        yield "eigen", damp
    yield from (("float64", share) for share in higher if share > GENTLE_DAMP)


def _clamp_eigenvalues(H: torch.Tensor, floor: float) -> torch.Tensor:
    """The nearest matrix to a finite H f64[k, k] (Frobenius) whose eigenvalues are at least floor."""
    values, vectors = torch.linalg.eigh(H)
    fixed = (vectors * values.clamp_min(floor)) @ vectors.T
    return (fixed + fixed.T) / 2
