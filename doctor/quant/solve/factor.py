"""Factors a Hessian with the least damping that works, and records every attempt.

H is positive semidefinite with rank at most the number of calibration rows, so a factor needs damping. How much is
set by rounding, not by rank: with few rows and a flat spectrum 1e-5 of mean diag(H) was enough, while one dominant
direction (a sink token) raises it with the width.

More damping cannot repair NaN, and LAPACK may return a NaN factor with info = 0, so both sides of the call are
checked for finite values.

Source: Higham, Accuracy and Stability of Numerical Algorithms, thm 10.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.linalg.lapack import dpotrf, dtrtri, spotrf, strtri

from doctor.quant.solve.numerics import all_finite, live_mean

# Rungs between damp and damp_max. Past 0.1 the result leans to RTN, so the eigenvalue repair comes first.
DAMP_RUNGS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GENTLE_DAMP = 0.1
EIGEN_LIMIT = 8192  # eigh in float64 takes minutes above, on a CPU


@dataclass(frozen=True)
class Attempt:
    """One try to factor H. outcome: ok, not-positive (info is the order of the minor) or non-finite."""

    damp: float
    precision: str  # float32, float64, eigen
    outcome: str
    info: int = 0


def factorise(H: torch.Tensor, damp: float, mean: float | None = None) -> tuple[torch.Tensor | None, int]:
    """(U, info): U upper triangular with (H + damp * mean * I)^-1 = U^T U, and why there is none, as in
    _reversed_factor.

    One factorization instead of three: with J the reversal of order, J H J = L L^T gives U = J L^-1 J, so there is one
    place that can fail, and 2/3 k^3 operations instead of 4/3.
    """
    L, info = _reversed_factor(H, damp, mean)
    if L is None:
        return None, info
    inverse, info = _inverse_of_triangle(L)
    if inverse is None:
        return None, info
    U = inverse.flip(0, 1).contiguous()
    return (U, 0) if all_finite(U) else (None, -1)


def _reversed_factor(H: torch.Tensor, damp: float, mean: float | None) -> tuple[torch.Tensor | None, int]:
    """(L, info): L lower triangular with L L^T = H + damp * mean * I in reversed order, and why there is none.

    H [k, k] in float32 or float64, which is the precision of the work; mean is the mean diagonal that damp is a share
    of (default: over live columns). Dead columns get the mean as their diagonal, which decouples them from the others.

    info = 0: L is good. info = j > 0: the leading minor of order j of the *reversed* matrix is not positive; j is near
    the rank when calibration rows are few but moves with rounding, so it is evidence and never part of a message.
    info = -1: H or L is not finite. Finite is tested on both sides of the call because LAPACK does not (spotrf of a
    matrix with one NaN returns info = 0 and a NaN factor: SciPy 1.17, OpenBLAS). A caller must not retry on -1.
    """
    if not all_finite(H):
        return None, -1
    mean = live_mean(H) if mean is None else mean
    damped = H.flip(0, 1).contiguous()
    diagonal = damped.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal, torch.full_like(diagonal, mean if mean > 0 else 1.0)))
    diagonal.add_(damp * mean)
    L, info = _lower_factor(damped)
    return (L, info) if L is None or all_finite(L) else (None, -1)


def _lower_factor(A: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """(L of A = L L^T, info); the lower triangle of A [k, k] is read, all of it overwritten.

    In Fortran's order the memory of A is that of A^T, so the upper factor R of A^T is L^T and nothing is copied.
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
    H: torch.Tensor, damp: float, damp_max: float, mean: float | None = None
) -> tuple[torch.Tensor | None, list[Attempt]]:
    """(U of `factorise` in the dtype of H, attempts): the first that succeeds, and every try before it as data."""
    found: list[torch.Tensor | None] = [None]
    mean = live_mean(H) if mean is None else mean

    def attempt(precision: str, share: float) -> int:
        if precision == "eigen":
            found[0], info = factorise(clamp_eigenvalues(H.to(torch.float64), share * mean), 0.0, mean)
        else:
            found[0], info = factorise(H.to(getattr(torch, precision)), share, mean)
        return info

    attempts = escalate(len(H), damp, damp_max, attempt, H.dtype == torch.float32)
    return None if found[0] is None else found[0].to(H.dtype), attempts


def escalate(
    columns: int, damp: float, damp_max: float, attempt: Callable[[str, float], int], single: bool = True
) -> list[Attempt]:
    """Every try of attempt(precision, share of damping) -> info, up to the first that succeeds.

    In order of what each costs in quality: float32 at damp (where H is `single`); float64 at damp (same problem, more
    digits); more damping up to 0.1, each rung no higher than damp_max; eigenvalues of H clamped from below at damp;
    more damping up to damp_max. Where all failed, the caller quantizes without feedback (RTN) and says so. A non-finite
    H ends the ladder at its first rung, since no damping makes NaN finite.
    """
    attempts: list[Attempt] = []
    for precision, share in _rungs(columns, damp, damp_max, single):
        info = attempt(precision, share)
        outcome = "ok" if info == 0 else "non-finite" if info < 0 else "not-positive"
        attempts.append(Attempt(share, precision, outcome, info))
        if info <= 0:
            break
    return attempts


def _rungs(columns: int, damp: float, damp_max: float, single: bool) -> Iterator[tuple[str, float]]:
    higher = sorted({rung for rung in (*DAMP_RUNGS, damp_max) if damp < rung <= damp_max})
    if single:
        yield "float32", damp
    yield "float64", damp
    yield from (("float64", share) for share in higher if share <= GENTLE_DAMP)
    if columns <= EIGEN_LIMIT and damp > 0:
        yield "eigen", damp
    yield from (("float64", share) for share in higher if share > GENTLE_DAMP)


def clamp_eigenvalues(H: torch.Tensor, floor: float) -> torch.Tensor:
    """The nearest matrix to a finite H f64[k, k] (Frobenius) whose eigenvalues are at least floor."""
    values, vectors = torch.linalg.eigh(H)
    fixed = (vectors * values.clamp_min(floor)) @ vectors.T
    return (fixed + fixed.T) / 2
