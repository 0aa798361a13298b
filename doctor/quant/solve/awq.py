"""AWQ: columns that carry large activations are scaled up before rounding, and what feeds them is scaled down.

Scaling column j of every linear that reads an input by s_j, and the input's source by 1 / s_j, leaves the function as
it is and moves rounding errors away from the columns that matter. s = rms(x)^r, or rms(x)^r / size(w)^(1-r), for the r
of a grid of 20 that loses least, no scaling among them; then each group gets the grid that loses least: its range
shortened (clipping), or fitted.

Both searches need X only as a Gram matrix: the loss of D = W - Q is tr(D H D^T), so a candidate costs one product with
H instead of a forward pass. That is exact for a linear's own output; AutoAWQ measures q, k and v behind the
whole attention, so its choices there can differ.

The source is a norm, v (for o) or up (for down), where rules/tables/architectures/ says that it is linear and that
nobody else reads it. What is stored in 16 bits is rounded first and s derived from it, so that the fold is exact for
the stored norm. A fold that changes the block's output all the same is taken back.

Sources: Lin et al. 2023 (arXiv 2306.00978) §3.2; casper-hansen/AutoAWQ awq/quantize/quantizer.py (the grid of ratios,
clipping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from doctor.core.errors import NotQuantizable
from doctor.core.recipe import DAMP
from doctor.core.tables import family as family_table
from doctor.model.spec import Linear, ModelSpec, condition, exists
from doctor.quant.solve import kernels
from doctor.quant.solve.gptq import Solution, improve, proxy_loss
from doctor.quant.solve.grid import (
    Grid,
    contiguous_groups,
    dequantize,
    fit,
    group_width,
    quantize,
    require_finite,
    store_scale,
)
from doctor.quant.solve.hessian import exact_products

RATIOS = tuple(step / 20 for step in range(20))
SHRINKS = tuple(1 - step / 20 for step in range(10))
# Rows of each weight, the same for all candidates: every one is judged on few, those that lose least there on more.
# Twelve hold the one that is best on more in 12 of 12 groups of linears of SmolLM2-135M, eight miss it once or more at
# 64 or 256 rows.
FIRST_ROWS, SEARCH_ROWS, FINALISTS = 128, 512, 12
_PLAIN, _PLUS_ONE = "weight * xhat", "(1 + weight) * xhat"


@dataclass(frozen=True)
class Source:
    """What a group of linears reads from. kind: norm, norm+1 (stored as weight - 1) or rows (of a linear); tensor: its
    weight.

    repeat: times that each head of v appears side by side in o's input; head: its width (1 and the whole width
    otherwise). A norm that every head has in common is a source of one head.
    """

    kind: str
    tensor: str
    repeat: int = 1
    head: int = 0

    def spread(self, s: torch.Tensor) -> torch.Tensor:
        """Factors of the source's channels to factors of the linear's columns."""
        return s if self.repeat == 1 else s.reshape(-1, 1, self.head).repeat(1, self.repeat, 1).reshape(-1)

    def gather(self, energy: torch.Tensor) -> torch.Tensor:
        """Mean over the columns that one channel of the source feeds."""
        return energy if self.repeat == 1 else energy.reshape(-1, self.repeat, self.head).mean(1).reshape(-1)


def source_of(spec: ModelSpec, group: list[Linear], quantized: dict[str, Linear]) -> tuple[Source | None, str]:
    """(source, "") of linears that share an input, or (None, why no scaling is possible)."""
    entry = family_table(spec.family)
    first = group[0]
    here = [
        t for t in entry.get("tensor", ()) if "role" in t and spec.in_layer(t.get("layers"), first.block) is not False
    ]
    entries = {item["role"]: item for item in here}
    linearity = entry.get("linear_paths", ())
    if first.role in ("o", "down"):
        return _rows_before(spec, first, linearity, quantized) if len(group) == 1 else (None, "it shares its input")
    norms = {entries.get(x.role, {}).get("norm_before") for x in group}
    norm = norms.pop() if len(norms) == 1 else None
    if norm is None:
        return None, "no norm is known to feed it alone"
    readers = [
        item
        for item in here
        if item.get("norm_before") == norm and exists(condition(item), entry["defaults"] | spec.config)
    ]
    if (
        any("{e}" in item["name"] or item["role"] not in {x.role for x in group} for item in readers)
        or first.expert is not None
    ):
        return None, "its norm feeds other linears too"
    own = next((t for t in entry["tensor"] if t["name"].endswith(f".{{i}}.{norm}.weight")), {})
    kind = {_PLAIN: "norm", _PLUS_ONE: "norm+1"}.get(own.get("norm", entry["norm"]))
    if kind is None:
        return None, "how its norm applies a weight is not known"
    before, _, _ = first.tensor.partition(f".{first.block}.")
    return Source(kind, f"{before}.{first.block}.{norm}.weight"), ""


def _rows_before(
    spec: ModelSpec, linear: Linear, linearity: list[str], quantized: dict[str, Linear]
) -> tuple[Source | None, str]:
    role, pair = ("v", "v->o") if linear.role == "o" else ("up", "up->down")
    parent = linear.name.rpartition(".")[0]
    source = next(
        (
            x
            for x in quantized.values()
            if x.role == role and x.expert == linear.expert and x.name.rpartition(".")[0] == parent
        ),
        None,
    )
    if pair not in linearity or source is None:
        return None, f"{pair} is not linear here, or {role} is no linear of its own that is quantized"
    if source.out_features == linear.in_features:
        return Source("rows", source.tensor), ""
    if (
        role != "v"
        or not spec.head_dim
        or source.out_features % spec.head_dim
        or linear.in_features % source.out_features
    ):
        return None, f"{role} has {source.out_features} rows for {linear.in_features} columns"
    return Source("rows", source.tensor, linear.in_features // source.out_features, spec.head_dim), ""


def find_scales(
    weights: list[torch.Tensor],
    H: torch.Tensor,
    source: Source,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
) -> tuple[torch.Tensor, str]:
    """(s f32 of the source's channels, how it was found or ""): the least sum of tr(D H D^T) over weights [n_i, k] that
    share H f32[k, k].

    The sum is over rows of each weight at equal distances, and counts for all of them. s is 1 with "" where nothing is
    better, and for channels that calibration never reached.
    """
    energy = source.gather(H.diagonal())
    live = energy > 0
    size = torch.where(live, energy, torch.ones_like(energy)).sqrt()
    filled = source.gather(_filled(weights, group_size)).clamp_min(1e-4)
    for W in weights:
        require_finite(W)
    candidates = [("", torch.ones_like(size))]
    candidates += [(f"rms(x)^{ratio:g}", size**ratio) for ratio in RATIOS[1:]]
    candidates += [
        (f"rms(x)^{ratio:g} / size(w)^{1 - ratio:g}", size**ratio / filled ** (1 - ratio)) for ratio in RATIOS
    ]
    tried = []
    for _, s in candidates:
        middle = (s.masked_fill(~live, 0).amax() * s.masked_fill(~live, math.inf).amin()).sqrt()
        tried.append(torch.where(live, s / middle, torch.ones_like(s)).clamp(1e-4, 1e4))

    def losses(numbers: Iterable[int], rows: int) -> dict[int, float]:
        sampled = [_some_rows(W, rows) for W in weights]
        found = {}
        for number in numbers:
            columns = source.spread(tried[number])
            found[number] = sum(
                _loss(_difference(W, columns, bits, group_size, sym, zero_min), H) / share for W, share in sampled
            )
        return dict(zip(found, torch.stack(list(found.values())).tolist()))  # the one wait for a device

    with exact_products():
        values = losses(range(len(tried)), FIRST_ROWS)
        if max(map(len, weights)) > FIRST_ROWS:
            values = losses(sorted({0, *sorted(values, key=values.get)[:FINALISTS]}), SEARCH_ROWS)
    best = min(values, key=values.get)
    return (tried[best], candidates[best][0]) if values[best] < math.inf else (torch.ones_like(size), "")


def _loss(D: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """tr(D H D^T), f64[]; Inf where D is not finite, so that such a candidate is none."""
    return ((D @ H) * D).sum(dtype=torch.float64).nan_to_num(nan=math.inf)


def _difference(
    W: torch.Tensor, columns: torch.Tensor, bits: int, group_size: int, sym: bool, zero_min: int
) -> torch.Tensor:
    """W * columns, rounded on min-max grids, brought back by columns, less W: f32[n, k]; not finite where no float16
    holds a scale.
    """
    if W.is_cuda and kernels.available(W.device) is None:
        return kernels.awq_difference(W, columns, bits, group_size, sym, zero_min=zero_min)
    scaled = W * columns
    try:
        grid = fit(scaled, bits, group_size, sym, zero_min=zero_min)
    except NotQuantizable:
        return torch.full_like(scaled, math.nan)
    return dequantize(quantize(scaled, grid, bits), grid) / columns - W


def _filled(weights: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """How far the weights of a column fill their groups' ranges on average, f32[k] in 0..1: a column of small ones can
    grow for nothing.
    """
    total = 0
    for W in weights:
        size = W.abs().to(torch.float32).reshape(len(W), -1, group_width(W.shape[1], group_size))
        total = total + (size / size.amax(-1, keepdim=True).clamp_min(1e-12)).reshape(W.shape).sum(0)
    return total / sum(map(len, weights))


def _some_rows(W: torch.Tensor, rows: int) -> tuple[torch.Tensor, float]:
    """(at most `rows` rows of W at equal distances, their share of all)."""
    n = len(W)
    if n <= rows:
        return W, 1.0
    return W[torch.arange(rows, device=W.device) * n // rows], rows / n


def fold(
    source: Source, s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(s as it comes out, weight, bias) of the source after dividing its output by s; f32, norms exact in `stored`.

    A channel whose new value would be 0 or not finite where the old is neither keeps its factor of 1.
    """
    bias = None if bias is None else (bias / s).to(stored).to(torch.float32)
    if source.kind == "rows":
        return s, weight / s[:, None], bias
    old = weight + 1 if source.kind == "norm+1" else weight
    new = (old / s - 1 if source.kind == "norm+1" else old / s).to(stored).to(torch.float32)
    whole = new + 1 if source.kind == "norm+1" else new
    real = old / whole
    good = torch.isfinite(real) & (real > 0) & torch.isfinite(whole)
    s = torch.where(good, real, torch.ones_like(s))
    return s, torch.where(good, new, weight), bias


def clip(
    W: torch.Tensor,
    H: torch.Tensor,
    start: Grid,
    width: int,
    bits: int,
    scale_dtype: torch.dtype = torch.float16,
    others: tuple[Grid, ...] = (),
) -> Grid:
    """The grid of each group of W f32[n, k] that loses least under H f32[k, k], of `start` with scales shortened to
    0.55 .. 1 and `others`.

    The loss is that of the group alone, d H_gg d^T.
    """
    n, k = W.shape
    blocks = torch.stack([H[i : i + width, i : i + width] for i in range(0, k, width)])  # [G, g, g]
    scale, zero, least = start.scale, start.zero, torch.full_like(start.scale, math.inf)
    for grid in (*(Grid(store_scale(start.scale * ratio, scale_dtype), start.zero) for ratio in SHRINKS), *others):
        D = (W - dequantize(quantize(W, grid, bits), grid)).reshape(n, -1, width).transpose(0, 1)  # [G, n, g]
        loss = (torch.bmm(D, blocks) * D).sum(-1).T
        better = loss < least
        scale, zero, least = (
            torch.where(better, grid.scale, scale),
            torch.where(better, grid.zero, zero),
            torch.where(better, loss, least),
        )
    return Grid(scale.contiguous(), zero.contiguous())


def solve(
    W: torch.Tensor,
    H: torch.Tensor,
    s: torch.Tensor | None,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    zero_min: int,
    damp: float = DAMP,
) -> Solution:
    """Codes of W[n, k], whose columns carry the factors s f32[k] (None: none), under H[k, k] of the scaled input.

    Clipped, rounded to nearest, then refined as GPTQ's codes are: published AWQ stops before that. loss as in
    gptq.solve; rtn_loss is that of the unscaled weight on a min-max grid. Raises NotQuantizable for a non-finite W.
    """
    require_finite(W)
    W, H = W.to(torch.float32), H.to(W.device, torch.float32)
    width = group_width(W.shape[1], group_size)
    with exact_products():
        start = fit(W, bits, group_size, sym, zero_min=zero_min)
        fitted = fit(W, bits, group_size, sym, mse=True, weight=H.diagonal(), zero_min=zero_min)
        grid = clip(W, H, start, width, bits, others=(fitted,))
        codes = quantize(W, grid, bits)
        loss = proxy_loss(W, dequantize(codes, grid), H)
        better = improve(W, H, codes, grid, bits=bits, group_size=group_size, sym=sym, zero_min=zero_min, damp=damp)
        gained = proxy_loss(W, dequantize(*better), H)
        if gained < loss:
            loss, (codes, grid) = gained, better
        plain = W if s is None else W / s
        first = start if s is None else fit(plain, bits, group_size, sym, zero_min=zero_min)
        rounded = dequantize(quantize(plain, first, bits), first)
        rtn_loss = proxy_loss(W, rounded if s is None else rounded * s, H)
    return Solution(codes, grid, contiguous_groups(W.shape[1], group_size, W.device), "awq", loss, rtn_loss, ())


class Folding:
    """Scales of one block: found on the float block, folded into its modules, taken back if its output moves."""

    def __init__(
        self,
        modules: dict[str, tuple[Linear, torch.nn.Module]],
        sources: dict[str, torch.nn.Module],
        dtype_of: Callable[[str], torch.dtype],
    ):
        """modules: the linears to quantize, by name; sources: every module of the block that has a weight, by its
        tensor.
        """
        self.modules, self.sources, self.dtype_of = modules, sources, dtype_of
        self.columns: dict[str, torch.Tensor] = {}  # factors of each linear's columns, by name
        self.notes: dict[str, str] = {}
        self.norms: set[str] = set()  # tensors of norms that changed: written in the output
        self._before: dict[tuple[torch.nn.Module, str], torch.Tensor] = {}

    def apply(self, spec: ModelSpec, group: list[str], H: torch.Tensor, **rules) -> None:
        """Find and fold the scales of linears that share the input of H; a note says where there is nothing to fold
        into.
        """
        linears = [self.modules[name][0] for name in group]
        source, why = source_of(spec, linears, {name: x for name, (x, _) in self.modules.items()})
        module = self.sources.get(source.tensor) if source else None
        if module is None:
            self.notes.update(dict.fromkeys(group, f"not scaled: {why or 'its norm is not in the block'}"))
            return
        width = linears[0].in_features
        if (
            source.kind != "rows" and len(module.weight) != width
        ):  # one norm for each head: its weight stands under all of them
            if width % len(module.weight):
                self.notes.update(
                    dict.fromkeys(group, f"not scaled: its norm has {len(module.weight)} channels for {width} columns")
                )
                return
            source = replace(source, repeat=width // len(module.weight), head=len(module.weight))
        weights = [_rows(*self.modules[name]) for name in group]
        s, found = find_scales(weights, H, source, **rules)
        if not found:
            self.notes.update(dict.fromkeys(group, "scales of 1 lose least"))
            return
        flipped = source.kind == "rows" and any(x.transposed for x, m in self.modules.values() if m is module)
        old = module.weight.detach()
        bias = getattr(module, "bias", None)
        stored = (
            torch.bfloat16
            if self.dtype_of(source.tensor) in (torch.float32, torch.float64)
            else self.dtype_of(source.tensor)
        )
        s, weight, new_bias = fold(source, s, old.T if flipped else old, bias, stored)
        self._put(module, "weight", weight.T if flipped else weight)
        if new_bias is not None:
            self._put(module, "bias", new_bias)
        changed = {source.tensor} if source.kind != "rows" else set()
        changed |= {source.tensor.removesuffix("weight") + "bias"} if new_bias is not None else set()
        self.norms |= changed
        columns = source.spread(s)
        for name, W in zip(group, weights, strict=True):
            linear, target = self.modules[name]
            self._put(target, "weight", (W * columns).T if linear.transposed else W * columns)
            self.columns[name] = columns
            self.notes[name] = f"scaled by {found}, folded into {source.tensor}"

    def take_back(self, why: str) -> None:
        """The block as it was."""
        for (module, name), value in self._before.items():
            module._parameters[name].data = value
        self.notes.update(dict.fromkeys(self.columns, why))
        self.columns, self.norms = {}, set()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What stands in the output in the place of the checkpoint's: folded norms and biases, in the dtype they are
        stored in.
        """
        found = {}
        for name in self.norms:
            owner, _, kind = name.rpartition(".")
            module = self.sources[f"{owner}.weight"]
            dtype = self.dtype_of(name)
            found[name] = module._parameters[kind].to(
                torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype
            )
        return found

    def _put(self, module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
        self._before.setdefault((module, name), module._parameters[name].data)
        module._parameters[name].data = value.contiguous()


def _rows(linear: Linear, module: torch.nn.Module) -> torch.Tensor:
    W = module.weight.detach()
    return W.T.contiguous() if linear.transposed else W
