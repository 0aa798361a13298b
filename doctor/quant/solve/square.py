"""The Hessian of a linear's input and its factor, in one square of memory.

H is symmetric and its factor is a triangle, so one square of 4 k^2 bytes holds both: H above the diagonal, the factor
on it and below, the diagonal of H apart. `matrix` makes the square symmetric again.

LAPACK's indices have 32 bits: k^2 passes them at k = 46,341. From there on the factor is computed in tiles, each of
which is within them; one linear's factor needs no more than three tiles beside the square either way.

Where the memory limit does not hold a square it lies in a file (mapped.py), and the factor in a second one: rows of a
whole square can be read in any order, those of a triangle only with a page of the disk for every value.

Where a GPU's memory does not hold a square it lies in the host's (`computes`): tiles go to the device and back while it
is factored, and rows of it are copied there when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from scipy.linalg.blas import dtrsm, strsm
from scipy.linalg.lapack import dpotrf, spotrf

from doctor.quant.solve import cpu
from doctor.quant.solve.factor import Attempt, clamp_eigenvalues, escalate
from doctor.quant.solve.mapped import Mapped
from doctor.quant.solve.numerics import LAPACK_MOST, TILE, all_finite, nonfinite_columns, tiles_of

_PANEL = 256  # rows that are mirrored at a time


class Square:
    """H f32[k, k] of calibration inputs, and room for its factor. Takes the memory of `values`, which is symmetric.
    file: the one that `values` lies in, None where memory holds it. computes: the device that a square in the host's
    memory is factored on and its rows are given on; None where it computes where it lies.
    """

    def __init__(self, values: torch.Tensor, file: Mapped | None = None, computes: torch.device | None = None):
        self._values = values
        self._file = file
        self._computes = computes
        self._second: Mapped | None = None  # the file of the factor
        self._diagonal = _diagonal_of(values, file)
        self._symmetric = True  # whether the lower triangle is H
        self._asked: tuple[float, float, torch.Tensor] | None = None  # whose factor the lower triangle is
        self._attempts: list[Attempt] = []

    @classmethod
    def of(cls, H: torch.Tensor | Square) -> Square:
        """A square of its own for a matrix, or the square itself."""
        return H if isinstance(H, Square) else cls(H.to(torch.float32, copy=True).contiguous())

    def __len__(self) -> int:
        return len(self._values)

    @property
    def device(self) -> torch.device:
        return self._values.device

    @property
    def hosted(self) -> bool:
        """Whether it lies in the host's memory because a device's is too small."""
        return self._computes is not None

    def _given(self, part: torch.Tensor) -> torch.Tensor:
        """A part where it is computed with."""
        return part if self._computes is None else part.to(self._computes)

    @property
    def values(self) -> torch.Tensor:
        """f32[k, k]: H above the diagonal; below it anything."""
        return self._values

    @property
    def lower(self) -> torch.Tensor:
        """f32[k, k]: the factor on the diagonal and below it, where there is one; above it anything."""
        return self._values if self._second is None else self._second.values

    def forget(self) -> None:
        """Let go of what lies in files."""
        for file in (self._file, self._second):
            if file is not None:
                file.forget()

    @property
    def let_go(self) -> Callable[[], None] | None:
        """`forget` of a square in files, which stays symmetric; None of one in memory."""
        return None if self._file is None else self.forget

    def strips(self) -> Iterator[torch.Tensor]:
        """`values` by rows, a tile at a time."""
        return (self._values[rows] for rows in self._rows())

    def finite(self) -> bool:
        """Whether no value is NaN or Inf."""
        return nonfinite_columns(self.strips()) is None

    def diagonal(self) -> torch.Tensor:
        """diag(H), f32[k]; not to be written to."""
        return self._given(self._diagonal)

    def matrix(self) -> torch.Tensor:
        """H f32[k, k], symmetric. A factor is given up."""
        if self._symmetric:
            return self._values
        values, self._symmetric, self._asked = self._values, True, None
        for at in range(0, len(values), _PANEL):
            end = at + _PANEL
            block = values[at:end, at:end]
            block.copy_(_whole(block))
            values[end:, at:end] = values[at:end, end:].T
        values.diagonal().copy_(self._diagonal)
        return values

    def column(self, j: int) -> torch.Tensor:
        """Column j of H, f32[k]."""
        if self._symmetric:
            return self._given(self._values[j].clone())
        parts = [self._values[:j, j], self._diagonal[j : j + 1], self._values[j, j + 1 :]]
        return self._given(torch.cat(parts))

    def strip(self, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of H from column `begin` on, f32[end - begin, k - begin]."""
        found = self._values[begin:end, begin:].clone()
        found[:, : end - begin] = _whole(found[:, : end - begin])
        found.diagonal().copy_(self._diagonal[begin:end])
        self.forget()
        return self._given(found)

    def columns(self, begin: int, end: int) -> torch.Tensor:
        """Columns [begin, end) of H, f32[k, end - begin]."""
        if self._symmetric:
            return self._given(self._values[begin:end]).T.contiguous()
        return torch.cat([self._given(self._values[:begin, begin:end]), self.strip(begin, end).T])

    def columns_of(self, which: torch.Tensor) -> torch.Tensor:
        """The columns `which` i64[w] of H, in that order, f32[k, w]."""
        j = which.to(self._values.device)
        if self._symmetric:
            found = self._values[j].T
            self.forget()
            return self._given(found.contiguous())
        above = torch.arange(len(self), device=j.device)[:, None] < j
        found = torch.where(above, self._values[:, j], self._values[j].T)
        found[j, torch.arange(len(j), device=j.device)] = self._diagonal[j]
        return self._given(found)

    def product(self, E: torch.Tensor) -> torch.Tensor:
        """E H, f32[n, k]."""
        k = len(self)
        if self._symmetric and k <= LAPACK_MOST and self._file is None and not self.hosted:
            return E @ self._values
        out = E * self.diagonal()
        for begin in range(0, k, TILE):
            end = min(k, begin + TILE)
            rows = self._given(self._values[begin:end, begin:])
            block, right = rows[:, : end - begin].triu(1), rows[:, end - begin :]
            out[:, begin:end].addmm_(E[:, begin:end], block + block.T).addmm_(E[:, end:], right.T)
            out[:, end:].addmm_(E[:, begin:end], right)
            self.forget()
        return out

    def factorise(self, damp: float, damp_max: float, mean: float, order: torch.Tensor | None = None) -> list[Attempt]:
        """Every try to factor H in `order` i64[k] (None: as it is), as `factor.escalate` has them, the last one used.
        Linears that share an input share it.

        Where the last one is ok, the lower triangle is the L of L L^T = H + damp * mean * I in reversed order. mean:
        of diag(H) over live columns; dead ones get it as their diagonal, which decouples them from the others.
        """
        steps = torch.arange(len(self)) if order is None else order.cpu() if self.hosted else order
        if self._asked is not None and self._asked[:2] == (damp, damp_max) and torch.equal(self._asked[2], steps):
            return self._attempts
        self._attempts = escalate(len(self), damp, damp_max, partial(self._attempt, mean, steps.flip(0)))
        self._asked = damp, damp_max, steps
        return self._attempts

    @property
    def factored(self) -> bool:
        """Whether the last try of `factorise` gave a factor."""
        return self._asked is not None and self._attempts[-1].outcome == "ok"

    def pivots(self) -> torch.Tensor:
        """M_pp of H = M M^T, M upper triangular in the order of the factor, f32[k]."""
        return self._given(_diagonal_of(self.lower, self._second).flip(0))

    def factor_panel(self, begin: int, end: int) -> torch.Tensor:
        """M[:end, begin:end] of H = M M^T, M upper triangular in the order of the factor: f32[end, end - begin]."""
        k = len(self)
        found = self._given(self.lower[k - end :, k - end : k - begin])
        self.forget()
        return found.flip(0, 1).triu(-begin)

    def _attempt(self, mean: float, turned: torch.Tensor, precision: str, share: float) -> int:
        """Factor H in the order `turned` with one precision and share of damping; info as in
        factor_in_place, and -1 where something is not finite."""
        work = torch.float32 if precision == "float32" else torch.float64
        clamped = clamp_eigenvalues(self.matrix().double(), share * mean) if precision == "eigen" else None
        diagonal = (self._diagonal if clamped is None else clamped.diagonal())[turned].to(work)
        diagonal = torch.where(diagonal > 0, diagonal, torch.full_like(diagonal, mean if mean > 0 else 1.0))
        diagonal.add_(share * mean if clamped is None else 0.0)
        if self._file is None:
            self._symmetric = False
        elif self._second is None:
            self._second = Mapped(self._file.folder, len(self))
        if clamped is not None:
            info = self._through_tiles(lambda rows, columns: clamped[turned[rows]][:, turned[columns]], diagonal)
        else:
            steps = turned.to(torch.int32)
            for rows in tiles_of(len(self), TILE):
                cpu.arrange(self._values, self._diagonal, steps, self.lower, rows)
                self.forget()
            if self._second is not None or self.hosted:
                for rows in self._rows():
                    self.lower[rows, rows].diagonal().copy_(diagonal[rows])
                info = factor_in_place(self.lower, TILE, self._second, work, self._computes)
            elif work == torch.float32:
                self.lower.diagonal().copy_(diagonal)
                info = factor_in_place(self.lower)
            else:
                info = self._through_tiles(lambda rows, columns: self.lower[rows, columns].double(), diagonal)
        return info or (0 if all(all_finite(self.lower[rows]) for rows in self._rows()) else -1)

    def _rows(self) -> Iterator[slice]:
        """Rows of the square, a tile at a time; those of files are let go of behind them."""
        for rows in tiles_of(len(self), TILE):
            yield rows
            self.forget()

    def _through_tiles(self, tile_of: Callable[[slice, slice], torch.Tensor], diagonal: torch.Tensor) -> int:
        """Factor in float64, tile by tile, and round into the lower triangle: a second square beside the first."""
        parts = tiles_of(len(self), TILE)
        tiles = [[tile_of(rows, columns) for columns in parts[: number + 1]] for number, rows in enumerate(parts)]
        for number, rows in enumerate(parts):
            tiles[number][number].diagonal().copy_(diagonal[rows])
        info = _factor(tiles, parts)
        for rows, found in zip(parts, tiles, strict=True):
            for columns, tile in zip(parts, found, strict=False):
                _put(self.lower[rows, columns], tile, rows == columns)
        return info


def factor_in_place(
    S: torch.Tensor,
    tile: int | None = None,
    file: Mapped | None = None,
    work: torch.dtype | None = None,
    computes: torch.device | None = None,
) -> int:
    """The lower triangle A of S [k, k] becomes L with A = L L^T, what lies above the diagonal stays. Returns LAPACK's
    info: 0, or the order of the first leading minor that is not positive. tile: columns worked on at a time; by default
    all of them, as long as LAPACK can index them. file: where S lies, read ahead and let go of row by row of tiles.
    work: the dtype of sums inside a tile, by default that of S. computes: the device of tiles, by default that of S.
    """
    if tile is None and len(S) <= LAPACK_MOST:
        # In Fortran's order the memory of S is that of S^T, so its upper factor is L^T and nothing is copied.
        return int({torch.float32: spotrf, torch.float64: dpotrf}[S.dtype](S.numpy().T, 0, 0, 1)[1])
    parts = tiles_of(len(S), tile or TILE)
    tiles = [[S[rows, columns] for columns in parts[: at + 1]] for at, rows in enumerate(parts)]
    return _factor(tiles, parts, file, work or S.dtype, computes)


def _factor(
    tiles: list[list[torch.Tensor]],
    parts: list[slice],
    file: Mapped | None = None,
    work: torch.dtype = torch.float64,
    computes: torch.device | None = None,
) -> int:
    """Factor a lower triangle of tiles in place, one column of tiles after the other; of those on the diagonal the
    lower triangle. Each needs the tiles left of it and of its diagonal only.
    """
    for j, columns in enumerate(parts):
        if file is not None:
            file.forget()
        D = tiles[j][j].to(computes, work, copy=True)
        for tile in tiles[j][:j]:
            left = tile.to(computes, work)
            D.addmm_(left, left.T, alpha=-1)
        D, info = _factor_of_tile(D)
        if info:
            return columns.start + info
        _put(tiles[j][j], D.to(tiles[j][j].device), True)
        for i, row in enumerate(tiles[j + 1 :], j + 1):
            if file is not None:
                file.forget()
                file.will_need(parts[min(i + 1, len(parts) - 1)])
            A = row[j].to(computes, work).contiguous()
            for tile, beside in zip(row[:j], tiles[j][:j], strict=True):
                A.addmm_(tile.to(computes, work), beside.to(computes, work).T, alpha=-1)
            row[j].copy_(_divided(A, D))
    return 0


def _factor_of_tile(D: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(L with D = L L^T in its lower triangle, LAPACK's info); D may be overwritten."""
    if D.device.type == "cpu":
        potrf = {torch.float32: spotrf, torch.float64: dpotrf}[D.dtype]
        return D, int(potrf(D.numpy().T, 0, 0, 1)[1])
    L, info = torch.linalg.cholesky_ex(D)
    return L, int(info)


def _divided(A: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
    """A L^-T, of a lower triangle L; A may be overwritten."""
    if A.device.type == "cpu":
        trsm = {torch.float32: strsm, torch.float64: dtrsm}[A.dtype]
        trsm(1.0, L.numpy().T, A.numpy().T, 0, 0, 1, 0, 1)  # A^T becomes L^-1 A^T
        return A
    return torch.linalg.solve_triangular(L.T, A, upper=True, left=False)


def _put(place: torch.Tensor, tile: torch.Tensor, diagonal: bool) -> None:
    """A tile where it belongs; of one on the diagonal the lower triangle."""
    place.copy_(torch.where(torch.ones_like(place, dtype=torch.bool).tril(), tile, place) if diagonal else tile)


def _diagonal_of(values: torch.Tensor, file: Mapped | None) -> torch.Tensor:
    """A copy of the diagonal of values [k, k]. In a file the system maps 64 KB and more around each value that is read,
    which can be all of it: tiles are let go of one by one.
    """
    if file is None:
        return values.diagonal().clone()
    found = torch.empty(len(values), dtype=values.dtype)
    for rows in tiles_of(len(values)):
        found[rows] = values[rows, rows].diagonal()
        file.forget()
    return found


def _whole(block: torch.Tensor) -> torch.Tensor:
    """A square block of H from what it has above its diagonal, with zeros on it."""
    above = block.triu(1)
    return above + above.T
