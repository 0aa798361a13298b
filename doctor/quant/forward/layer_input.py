"""The calibration input of linears that share it: its Hessian and the facts of its spectrum."""

from __future__ import annotations

from doctor.core.recipe import Recipe
from doctor.core.records import HessianFacts
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.spectrum import spectrum
from doctor.quant.solve.square import Square


class LayerInput:
    """The input of one or more linears: its H f32[k, k] with room for a factor, `fact`, what its spectrum says, and
    `channels` f32[k], the largest |x| of each.

    damp: share of mean diag(H) that a factorisation adds first.
    """

    def __init__(self, hessian: Hessian, recipe: Recipe):
        self.channels = hessian.largest
        self.H = Square(hessian.take(), hessian.file, hessian.device if hessian.hosted else None)
        self.damp = damp = recipe.damp_for(hessian.rows)
        s, bad = spectrum(self.H, hessian.rows, damp), hessian.nonfinite
        self.fact = HessianFacts(
            hessian.rows,
            hessian.columns,
            bad.count if bad else 0,
            (bad.row, bad.channel) if bad else None,
            s.finite,
            s.dead,
            s.mean_diag,
            s.lambda_max,
            s.damp_needed,
            s.condition,
        )

    @property
    def largest(self) -> float:
        """The largest |x|."""
        return float(self.channels.max())

    @property
    def usable(self) -> bool:
        """Whether any calibration row reached it."""
        return bool(self.fact.tokens)
