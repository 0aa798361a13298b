"""What every width would do to every linear, measured on the way through a run of one width.

GPTQ's loss of a width is not solved for: it is the sum over columns of what the later columns cannot make good, and
that is the pivot D_j of H = M D M^T times the squared rounding error of column j (gptq.py). The errors of plain
rounding on the width's own grid stand in for those of the loop, and only their ratio to those of the run's own width is
used: what the run's own errors cost is measured on the run's output (sensitivity.py). So a width costs a fit of its
grid and no product with H.

Row by row, since the outputs of a linear do not matter alike: the hurt of a width is the sum over outputs of what the
run's error there costs times that ratio, in nats a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from doctor.core.recipe import Recipe
from doctor.formats.gguf import blocks_of
from doctor.formats.registry import format_of
from doctor.model.linears import Linear
from doctor.quant.allocation.sensitivity import Harms
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.linear import grid_options
from doctor.quant.setup import Solved
from doctor.quant.solve import ggml
from doctor.quant.solve.gptq import pivots_of
from doctor.quant.solve.grid import GridParams, dequantize, quantize
from doctor.quant.solve.grid_search import fit_owned, owners

Hurts = dict[float, float]  # width -> predicted KL in nats a token


Shares = dict[float, torch.Tensor]  # width -> error of each output in shares of the run's own, f32[out_features]


class WidthSurvey:
    """Looks on while a run quantizes. solved: the run's recipe. widths: to measure, in the groups of `recipe`. shares:
    by the name of a linear, {} for one whose are not known: no row reached it, or its Hessian has no factor.
    """

    def __init__(self, solved: Recipe, recipe: Recipe, widths: Iterable[float]):
        self._solved, self._recipe, self._widths = solved, recipe, tuple(widths)
        self._pivots: tuple[LayerInput | None, torch.Tensor | None] = (None, None)  # of the last input
        self.shares: dict[str, Shares] = {}

    def see(self, linear: Linear, W: torch.Tensor, given: LayerInput | None, solved: Solved | None) -> None:
        self.shares[linear.name] = {}
        if solved is None or given is None or not given.usable:
            return
        pivots = self._pivots_of(given)
        if pivots is None:
            return
        W = W.to(torch.float32)
        size = given.H.diagonal()
        own = _rounded(W, self._solved.for_linear(linear.name), pivots, size)
        for width in self._widths:
            e = _rounded(W, self._recipe.of_width(width), pivots, size)
            share = torch.where(own > 0, e / own, 0.0)  # a row of zeros has nothing to lose
            self.shares[linear.name][width] = share.to("cpu", torch.float32)

    def hurts(self, harms: Harms) -> dict[str, Hurts]:
        """By the name of a linear. harms: what the errors of the run's output cost."""
        return {
            name: {width: float((share * harms[name]).sum()) for width, share in shares.items()}
            if name in harms
            else {}
            for name, shares in self.shares.items()
        }

    def _pivots_of(self, given: LayerInput) -> torch.Tensor | None:
        """The pivots f32[k] of the Hessian in the order in which columns are rounded; None where it has no factor."""
        if self._pivots[0] is given:
            return self._pivots[1]
        moved = self._recipe.act_order and not format_of(self._recipe).in_blocks  # whose columns keep their order
        pivots = pivots_of(given.H, given.damp, self._recipe.damp_max, moved)
        self._pivots = (given, pivots)
        return pivots


def _rounded(W: torch.Tensor, recipe: Recipe, pivots: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """sum_j D_j (W - Q)_j^2 of each row, f64[n], for plain rounding on the recipe's grid. size f32[k]: diag(H)."""
    if format_of(recipe).in_blocks:
        kind = blocks_of(recipe).type_of(recipe.bits, W.shape[1])
        E = W - ggml.rounded_values(W, kind, pivots)
        return (E.square() @ pivots).to(torch.float64)
    options = grid_options(recipe)
    params = GridParams(mse=recipe.mse, **options)
    g_idx = owners(params, size)
    grid = fit_owned(params, W, pivots, g_idx)
    index = g_idx if params.wide else None  # of neighbours
    E = W - dequantize(quantize(W, grid, params.code_bits, index, params.scale_dtype), grid, index)
    return (E.square() @ pivots).to(torch.float64)
