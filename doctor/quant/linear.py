"""One linear: solved on its calibration input, packed in the output format, and replaced by what an engine will read
back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from doctor.core.errors import CudaError, NotQuantizable
from doctor.core.messages import _
from doctor.core.methods import is_calibrated
from doctor.core.recipe import Recipe
from doctor.core.records import SolveRecord
from doctor.formats.gguf import blocks_of
from doctor.formats.grid import E4M3
from doctor.formats.registry import format_of
from doctor.model.linears import Linear
from doctor.plan.groups import together
from doctor.quant import pack
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.forward.stored_linear import Give, StoredLinear
from doctor.quant.records import failed
from doctor.quant.solve import awq, ggml, gptq
from doctor.quant.solve.eight_bit_floats import round_to_floats
from doctor.quant.solve.float_scale import divisor_of, scale_of
from doctor.quant.solve.rtn import round_to_nearest
from doctor.quant.solve.solution import Solution

# Of refinement. Two more passes lower tr(E H E^T) on unseen text by 1 to 3 % (bench/low_bits.py), where errors are
# large; whole models of 4 bits were not judged with them.
PASSES_BELOW_4_BITS = 3


@dataclass(frozen=True)
class Solved:
    """What solving one linear gave. solution: None where there is none; failure says why."""

    solution: Solution | ggml.BlockSolution | None
    failure: str
    seconds: float


@dataclass(frozen=True)
class Packed:
    """One linear in the output format. parts: its tensors by full name; weight: gives W f32[n, k] that an engine reads
    back from them.
    """

    parts: dict[str, torch.Tensor]
    weight: Give


def grid_options(recipe: Recipe, divisor: float = 1.0) -> dict[str, Any]:
    """bits, group_size and sym of the recipe, and what the output format asks of a grid: the least zero point (GPTQ v1
    stores zero - 1), how a scale is stored, under this divisor where the format has one, and whether with a sign.
    """
    kind = format_of(recipe).grid(recipe.scheme)
    return {
        "bits": kind.bits,
        "group_size": kind.group_size,
        "sym": kind.sym,
        "zero_min": kind.zero_min,
        "scale_dtype": scale_of(kind, divisor),
        "signed": kind.signed,
        **({"squared": True, "wide": kind.wide} if kind.squared else {}),
    }


def weight_of(linear: Linear, module: nn.Module) -> torch.Tensor:
    """W [out_features, in_features] of a module, whichever way it stores it."""
    W = module.stored if isinstance(module, StoredLinear) else module.get_parameter("weight").detach()
    return W.T.contiguous() if linear.transposed else W


def put_weight(module: nn.Module, give: Give, transposed: bool) -> None:
    """Replace the module's weight by the W [out_features, in_features] that `give` returns, in its dtype and on its
    device.
    """
    if isinstance(module, StoredLinear):
        module.hold(give)
        return
    old, W = module.get_parameter("weight"), give()
    old.data = (W.T if transposed else W).to(old.device, old.dtype).contiguous()


def solve_linear(
    linear: Linear,
    module: nn.Module,
    given: LayerInput | None,
    recipe: Recipe,
    columns: torch.Tensor | None = None,
    divisor: float = 1.0,
) -> Solved:
    """Codes and grid of one linear. given: its calibration input, None without calibration. columns f32[k]: factors
    that AWQ folded into the weight's columns, None for none. divisor: of its scales, from `divisors`.
    """
    started = time.perf_counter()
    try:
        solution = _solution(weight_of(linear, module), given, recipe.for_linear(linear.name), columns, divisor)
    except NotQuantizable as error:
        return Solved(None, error.message, time.perf_counter() - started)
    return Solved(solution, "", time.perf_counter() - started)


def _solution(
    W: torch.Tensor, given: LayerInput | None, recipe: Recipe, columns: torch.Tensor | None, divisor: float
) -> Solution | ggml.BlockSolution:
    form = format_of(recipe)
    if form.in_blocks:
        block = blocks_of(recipe).type_of(recipe.bits, W.shape[1])
        if given is None or not given.usable:
            return ggml.solve(W, None, block)
        return ggml.solve(W, given.H, block, damp=given.damp, damp_max=recipe.damp_max)
    kind = form.grid(recipe.scheme)
    if kind.levels == E4M3:
        return round_to_floats(W, kind)
    options = grid_options(recipe, divisor)
    if given is None or not given.usable or not recipe.solver.calibrated:
        return round_to_nearest(W, mse=recipe.mse, **options)
    if recipe.solver.folds_scales:
        return awq.solve(W, given.H.matrix(), columns, damp=given.damp, **options)
    return gptq.solve(
        W,
        given.H,
        mse=recipe.mse,
        act_order=recipe.act_order,
        damp=given.damp,
        damp_max=recipe.damp_max,
        refine=PASSES_BELOW_4_BITS if kind.bits < 4 else 1,
        **options,
    )


def pack_linear(
    linear: Linear, solved: Solved, recipe: Recipe, divisor: float = 1.0, given: LayerInput | None = None
) -> Packed:
    """The solution in the recipe's output format. divisor, given: as in solve_linear. Raises NotQuantizable where
    there is none, or the format cannot hold it; CudaError where words packed on a GPU do not read back.
    """
    if solved.solution is None:
        raise NotQuantizable(solved.failure)
    own = recipe.for_linear(linear.name)
    solution = solved.solution
    if isinstance(solution, ggml.BlockSolution):
        return Packed({f"{linear.name}.{solution.kind.name}": solution.words}, solution.weight)
    grid = solution.grid
    if format_of(own).grid(own.scheme).divided:
        grid = grid._replace(divisor=torch.tensor([divisor], dtype=torch.float32, device=grid.scale.device))
    parts = pack.pack_linear(linear.name, solution.codes, grid, solution.g_idx, own)
    if own.scheme.inputs:
        if given is None or not given.usable:
            raise NotQuantizable(
                _("no calibration row reached it, so its inputs have no scale."),
                _("Calibrate on more rows, or choose a scheme that scales activations while serving."),
            )
        inputs = format_of(own).input_parts(own, given.largest)
        parts |= {f"{linear.name}.{part}": tensor for part, tensor in inputs.items()}
    device = solution.codes.device
    if device.type == "cuda" and not torch.equal(pack.unpack_linear(linear.name, parts, own), solution.weight()):
        raise CudaError(
            _(
                "{name}: packed weights do not round-trip on {device}: dequantize(pack(W)) != W.",
                name=linear.name,
                device=str(device),
            ),
            _("Set DOCTOR_KERNELS=0 to quantize with torch, and report this text."),
        )
    own_weight = partial(pack.unpack_linear, linear.name, parts, own, (linear.out_features, linear.in_features))
    rounds = format_of(own).grid(own.scheme).squared  # readers round the products, too
    weight = own_weight if rounds else solution.weight
    return Packed({name: part.cpu() for name, part in parts.items()}, weight)


def divisors(modules: Mapping[str, tuple[Linear, nn.Module]], recipe: Recipe) -> dict[str, float]:
    """The divisor of the scales of each linear, from the weights as they are now: one for those that an engine joins.
    {} for a format without.
    """
    own = {name: recipe.for_linear(name) for name in modules}
    modules = {name: pair for name, pair in modules.items() if format_of(own[name]).grid(own[name].scheme).divided}
    most = {name: float(weight_of(*pair).abs().amax()) for name, pair in modules.items()}
    linears = [linear for linear, _module in modules.values()]
    return {name: divisor_of(max(most[other] for other in together(linears, [name]))) for name in most}


def outcome(solved: Solved, given: LayerInput | None, recipe: Recipe, folded: str = "") -> SolveRecord:
    """The fact that rules judge. folded: what AWQ did to the linear's columns, "" for another method."""
    solution = solved.solution
    if solution is None:
        return failed(recipe, solved.failure)
    note = folded if solution.outcome == recipe.solver.name else ""
    if not is_calibrated(solution.outcome) and recipe.solver.calibrated:
        note = (
            _("no calibration row reached it")
            if given is None or not given.usable
            else _("its Hessian could not be factored")
        )
    used = solution.attempts[-1] if solution.attempts and is_calibrated(solution.outcome) else None
    return SolveRecord(
        solution.outcome,
        recipe.damp,
        used.damp if used else 0.0,
        used.precision if used else "",
        solution.loss,
        solution.rtn_loss,
        tuple((a.damp, a.precision, a.outcome) for a in solution.attempts),
        note,
    )
