"""Rows of a weight to the tensors of a format, without calibration: what torch defines here, cpu/round.c does at the
pace of memory.

A format of 8-bit floats or integers scales each row, tile or group by its largest weight. NVFP4 tries one more scale a
group (the largest weight on 4 instead of 6) and takes the one of less squared error, where the recipe asks for that
(mse). MXFP4 does not: the powers of two beside lower the squared error and raise the divergence (KL 0.469 for 0.466 on
SmolLM2-135M, 1.13 for 1.05 on Gemma 3 270M).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch

from doctor.core.recipe import Recipe
from doctor.formats.base import Format
from doctor.formats.grid import E2M1, E4M3, Grid, GridKind, as_e4m3, dequantize
from doctor.formats.registry import format_of
from doctor.quant.solve.eight_bit_floats import scales_of
from doctor.quant.solve.float_scale import E2M1_MOST, FloatScale
from doctor.quant.solve.grid import nearest, require_finite, store_scale
from doctor.scan import native

_DTYPES = {torch.float32: 0, torch.bfloat16: 2}
_LEVELS = {E4M3: 0, "": 1, E2M1: 2}
_INT8_MOST = 127.5  # absmax on the middle of the last step of either side, as the solver's grids have it


class Rounded(NamedTuple):
    """Tensors of these rows by the last part of their names; sums of squared errors and of squared weights."""

    parts: dict[str, torch.Tensor]
    lost: float
    whole: float


@dataclass(frozen=True)
class Rounding:
    """How weights of a recipe are rounded. divisor: of NVFP4's scales, 1 elsewhere."""

    form: Format
    kind: GridKind
    recipe: Recipe
    divisor: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, divisor: float = 1.0) -> Rounding:
        form = format_of(recipe)
        return cls(form, form.grid(recipe.scheme), recipe, divisor)

    @property
    def rows(self) -> int:
        """Rows that can only be rounded together."""
        return self.kind.tile[0] if self.kind.tile else 1

    def round(self, W: torch.Tensor) -> Rounded:
        """W[n, k] bf16, f16 or f32, n whole tiles but for the last rows. Raises NotQuantizable for a non-finite W."""
        W = W if W.dtype in _DTYPES else W.to(torch.float32)
        W = W.contiguous()
        spans = largest(W, self._width(W.shape[1]))
        if not bool(torch.isfinite(spans).all()):
            require_finite(W)
        scale, others = self._scales(spans)
        found = self._native(W, scale, others) if native.level() else None
        return found or self._in_torch(W, scale, others)

    def _width(self, k: int) -> int:
        if self.kind.tile:
            return self.kind.tile[1]
        return k if self.kind.group_size == -1 else self.kind.group_size

    def _scales(self, spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(f32[n, G], f32[others, n, G]): the scale of values of each group, and others to try."""
        none = spans.new_empty(0, *spans.shape)
        if self.kind.levels == E4M3:
            return scales_of(spans, self.kind), none
        if self.kind.levels != E2M1:
            scale = torch.where(spans > 0, spans / _INT8_MOST, 1.0)
            return store_scale(scale, self.kind.torch_scale_dtype), none
        float_scale = FloatScale(not self.kind.divided, self.divisor)
        if float_scale.power:
            return float_scale.first(spans) * 2, none
        zeros = spans == 0
        empty = zeros if bool(zeros.any()) else None
        on_six = float_scale.of_values(spans, E2M1_MOST, empty)
        return on_six, float_scale.of_values(spans, 4.0, empty)[None] if self.recipe.mse else none

    def _native(self, W: torch.Tensor, scale: torch.Tensor, others: torch.Tensor) -> Rounded | None:
        """By cpu/round.c; None where a width is none of its own."""
        n, k = W.shape
        width = self._width(k)
        if self.kind.levels == E2M1 and width % 16:
            return None
        halves = 2 if self.kind.levels == E2M1 else 1
        out = torch.empty(n, k // halves, dtype=torch.uint8)
        scale, others, sums = scale.contiguous(), others.contiguous(), torch.zeros(2, dtype=torch.float64)
        native.function("doctor_round_groups")(
            _at(W),
            ctypes.c_int(_DTYPES[W.dtype]),
            _i64(n),
            _i64(k),
            _i64(width),
            ctypes.c_int(_LEVELS[self.kind.levels]),
            _at(scale),
            _at(others),
            _i64(len(others)),
            _at(out),
            _at(sums),
        )
        return Rounded(self._parts(out, scale), float(sums[0]), float(sums[1]))

    def _parts(self, out: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """The format's tensors of codes as they are stored, u8, and the scales that the format packs itself."""
        word = self.form.words or "weight"
        stored = {0: as_e4m3, 1: lambda codes: codes.view(torch.int8), 2: lambda codes: codes}
        parts = self.form.pack(scale.new_empty(len(scale), 0, dtype=torch.uint8), self._grid(scale), None, self._scheme)
        return {**parts, word: stored[_LEVELS[self.kind.levels]](out)}

    @property
    def _scheme(self):
        return self.recipe.scheme

    def _grid(self, scale: torch.Tensor) -> Grid:
        """The grid as the format packs it, of scales of values."""
        if self.kind.levels == E2M1:
            zero = torch.full(scale.shape, 12, dtype=torch.int32)
            return Grid(scale / 2, zero, divisor=torch.tensor([self.divisor], dtype=torch.float32))
        if self.kind.levels == E4M3:
            return Grid(scale, torch.zeros(scale.shape, dtype=torch.int32), E4M3)
        return Grid(scale, torch.full(scale.shape, 128, dtype=torch.int32))

    def _in_torch(self, W: torch.Tensor, scale: torch.Tensor, others: torch.Tensor) -> Rounded:
        """The definition."""
        W, width = W.to(torch.float32), self._width(W.shape[1])
        best = self._error(W, scale, width)
        for other in others:
            error = self._error(W, other, width)
            scale = torch.where(error < best, other, scale)
            best = torch.minimum(error, best)
        codes = self._codes(W, scale, width)
        parts = self.form.pack(codes, self._grid(scale), None, self._scheme)
        return Rounded(parts, float(best.double().sum()), float(W.double().square().sum()))

    def _codes(self, W: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
        """u8[n, k] as the format packs them."""
        x = W / scale.repeat_interleave(width, 1)
        if self.kind.levels == E4M3:
            return x.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        if self.kind.levels == E2M1:
            return nearest(x.mul_(2), torch.tensor(12.0), 4, FloatScale(True)).to(torch.uint8)
        return nearest(x, torch.tensor(128.0), 8, torch.bfloat16).to(torch.uint8)

    def _error(self, W: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
        """Squared errors f32[n, G]."""
        off = dequantize(self._codes(W, scale, width), self._grid(scale)).sub_(W).square_()
        return off.reshape(len(W), -1, width).sum(2)


def largest(W: torch.Tensor, width: int) -> torch.Tensor:
    """f32[n, k / width]: the largest |w| of each group of W[n, k], bf16 or f32; not finite where a weight is not."""
    n, k = W.shape
    if native.level() is None:
        spans = W.abs().reshape(n, -1, width).amax(2).to(torch.float32)
        return spans
    spans = torch.empty(n, k // width)
    native.function("doctor_group_span")(
        _at(W), ctypes.c_int(_DTYPES[W.dtype]), _i64(n), _i64(k), _i64(width), _at(spans)
    )
    return spans


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_i64 = ctypes.c_int64
