"""The Hessian of a linear, H = 2/n X^T X, summed over batches of calibration rows.

Rows of the output error (W - Q) X^T have this quadratic form. Every row of W and every linear that reads the same
input share it.

A non-finite value is never repaired here. It is recorded where it first appears (calibration row and channel), stays
in H, and stops the factorization (factor.py).

Source: Frantar et al. 2022 (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.linalg.blas import dsyrk, ssyrk

from doctor.quant.solve import cuda
from doctor.quant.solve.mapped import Mapped
from doctor.quant.solve.numerics import LAPACK_MOST, TILE, all_finite, exact_products, tiles_of

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


class Hessian:
    """Accumulates H = 2/n X^T X over batches of calibration rows.

    float32 sums are enough for rows of bf16 activations; float64 gives the last digits that float32 loses with a
    dominant direction (least damp 1e-3 -> 1e-7 at k = 2048), which casting a finished float32 H does not.
    """

    def __init__(
        self,
        columns: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        file: Mapped | None = None,
        hosted: bool = False,
    ):
        """file: where sums in float32 lie on a CPU, None for memory. hosted: the sums lie in the host's memory, because
        the device's, where products are computed, is too small for them.
        """
        self.columns, self.device = columns, torch.device(device)
        self.hosted = hosted
        self.rows = 0
        self.largest = torch.zeros(columns, device=device)  # the largest |x| of each channel
        self._nonfinite: NonFinite | None = None
        self._scan = _scan_on(torch.device(device)) if dtype == torch.float32 else None
        self.file = file
        place = "cpu" if hosted else device
        self.sums = torch.zeros(columns, columns, dtype=dtype, device=place) if file is None else file.values
        # On a CPU BLAS computes the half that is not its mirror image: 1.6 times faster than a full product.
        self._syrk = {torch.float32: ssyrk, torch.float64: dsyrk}.get(dtype) if self.sums.device.type == "cpu" else None
        self._tiled = file is not None or hosted or (columns > LAPACK_MOST and self._syrk is not None)
        self._mixed = dtype == torch.float32 and mixed_products(self.device)

    def add(self, X: torch.Tensor) -> None:
        """Adds the rows of X[..., k], any float dtype. The first non-finite value is kept in `nonfinite`, and in H."""
        X = X.reshape(-1, self.columns)
        if X.numel():
            low, high = X.amin(0), X.amax(0)
            self.largest = torch.maximum(self.largest, torch.maximum(-low, high).to(self.largest))
        if self._scan is not None:
            self._scan.add(X.to(self.device, torch.float32 if X.dtype == torch.float64 else X.dtype))
        else:
            self._look_for_nonfinite(X)
        with exact_products():
            for part in X.split(_ROWS_AT_A_TIME):
                part = part.to(self.device)
                if self.hosted:
                    self._add_tiles(part)
                    continue
                if self._mixed and part.dtype in (torch.bfloat16, torch.float16):
                    self.sums += torch.mm(part.T, part, out_dtype=torch.float32)
                    continue
                part = part.to(self.sums.dtype)
                if self._tiled:
                    for rows in tiles_of(self.columns):
                        self.sums[rows, : rows.stop].addmm_(part[:, rows].T, part[:, : rows.stop])
                        self._forget()
                elif self._syrk:
                    # Transposed views are in Fortran's order, so nothing is copied and the lower half of sums is
                    # written. Not part.numpy(), which would keep a suspended forward from spilling it (spill.py).
                    self._syrk(1.0, np.from_dlpack(part.contiguous()).T, beta=1.0, c=self.sums.numpy().T, overwrite_c=1)
                else:
                    self.sums.addmm_(part.T, part)
        self.rows += X.shape[0]

    def _add_tiles(self, part: torch.Tensor) -> None:
        """Add the products of rows part[m, k] on the device to sums in the host's memory, a row of tiles at a time."""
        mixed = self._mixed and part.dtype in (torch.bfloat16, torch.float16)
        part = part if mixed else part.to(self.sums.dtype)
        for rows in tiles_of(self.columns):
            left, right = part[:, rows].T, part[:, : rows.stop]
            product = torch.mm(left, right, out_dtype=torch.float32) if mixed else left @ right
            self.sums[rows, : rows.stop] += product.to(self.sums.device)
            self._forget()

    def parts(self) -> Iterator[torch.Tensor]:
        """The sums by rows, as many as a device that does not hold them all takes."""
        return (self.sums[rows] for rows in tiles_of(self.columns)) if self.hosted else iter([self.sums])

    def take(self) -> torch.Tensor:
        """H [k, k], exactly symmetric, in the dtype of the sums, whose memory it takes: nothing can be added any more.

        All zeros before the first row.
        """
        H, self.sums = self.sums, torch.empty(0)
        for rows in tiles_of(self.columns):
            H[rows].mul_(2 / max(1, self.rows))
            self._forget()
        panel = TILE if self._tiled else _PANEL
        for at in range(0, self.columns, panel):
            end = at + panel
            square, beside, below = H[at:end, at:end], H[at:end, end:], H[end:, at:end]
            if self._syrk:
                square.tril_().add_(square.tril(-1).T)
            else:
                square.copy_((square + square.T) / 2)
                below.add_(beside.T).mul_(0.5)
            for rows in tiles_of(len(below)):  # few columns of every row: of a file, pages enough to map all of it
                beside[:, rows] = below[rows].T
                self._forget()
        return H

    def _forget(self) -> None:
        if self.file is not None:
            self.file.forget()

    @property
    def nonfinite(self) -> NonFinite | None:
        """The first value that is not finite. On a device this waits for the batches so far, which adding them does
        not.
        """
        if self._scan is not None and self._scan.numel:
            found = self._scan.read()
            count = int(found["n_nan"] + found["n_inf"])
            return NonFinite(*divmod(int(found["first_nonfinite"]), self.columns), count) if count else None
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


def _scan_on(device: torch.device) -> cuda.DeviceScan | None:
    """A DeviceScan, which counts without waiting for the device; None where no kernel runs."""
    if device.type != "cuda":
        return None
    return cuda.DeviceScan(device) if cuda.available(device) is None else None


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
