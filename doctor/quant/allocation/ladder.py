"""What a budget can buy, from headers alone: the linears that share a width, the sizes of their options, and the
uniform model of the same size that a mixture must beat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, NotQuantizable
from doctor.core.facts import Unavailable
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe, is_kept, unfit
from doctor.core.widths import widths_from
from doctor.formats.gguf import blocks_of
from doctor.formats.registry import format_of
from doctor.model.fused_experts import unfuse
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec, build_spec
from doctor.plan.groups import FUSED
from doctor.plan.mixture import with_mixture
from doctor.plan.runtimes import reads, runtime_entries
from doctor.quant import budget as memory
from doctor.quant.allocation.budget import Budget
from doctor.quant.allocation.choose import Chosen, Unit

LEAST_BITS = 3  # by default: errors of 2-bit linears do not add up, so the prediction fails them
_GROUPS = (128, 64, 32)
# What prints as the same number of bits a weight is within the budget: compressed-tensors states the shape of each
# linear in 16 bytes, and 4 bits in groups of 64, which people call 4.25, are 4.2503 in SmolLM2.
_PRINTED = 0.0005


@dataclass(frozen=True)
class Ladder:
    """units: names -> the linears that share a width. recipe: of a mixture, whose widths are not chosen yet. uniform:
    the recipe of one width. weights: of all these linears. bits: that may be spent on them.
    """

    units: Mapping[Unit, tuple[Linear, ...]]
    recipe: Recipe
    uniform: Recipe
    widths: tuple[float, ...]
    weights: int
    bits: int

    @property
    def provisional(self) -> Recipe:
        """A mixture of all widths, for checks before there is one."""
        units = list(self.units.values())
        named = [(linears, self.widths[at % len(self.widths)]) for at, linears in enumerate(units)]
        return mixture(self.uniform, named)

    def size_of(self, unit: Unit, width: float) -> int:
        """Bits of everything that a unit stores at this width."""
        return _size(self.units[unit], self.recipe.of_width(width))

    def recipe_of(self, chosen: Chosen) -> Recipe:
        """The recipe of a choice."""
        return mixture(self.recipe, [(self.units[unit], option.width) for unit, option in chosen.items()])

    @property
    def uniform_name(self) -> str:
        """The uniform recipe as people write it: `4-bit g64`, `Q4_K_M`."""
        if format_of(self.uniform).in_blocks:
            form = blocks_of(self.uniform)
            return (form.mixtures if self.uniform.bits_for else form.types)[self.uniform.bits]
        return self.uniform.label().partition(" ")[2]

    def uniform_bpw(self) -> float:
        """Bits a weight of the uniform model."""
        return _size([x for unit in self.units.values() for x in unit], self.uniform) / self.weights


def ladder(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, asked: Budget) -> Ladder:
    """Raises DoctorError for a budget that cannot be met, and for a recipe without widths to choose from."""
    form = format_of(recipe)
    if (
        recipe.bits_for
        or recipe.schemes_for
        or not recipe.solver.calibrated
        or not (form.own_widths and recipe.solver.own_widths)
    ):
        raise DoctorError(
            _(
                "--bpw with {method} in the {format} format: needs a calibrated method and widths to choose from.",
                method=recipe.method,
                format=form.name,
            ),
            _("Leave --for at gptq and --override out."),
        )
    checkpoint, spec = unfuse(checkpoint, spec, recipe)
    linears = [x for x in spec.linears if x.block is not None and _quantized(recipe, x)]
    if not linears:
        raise NotQuantizable(_("{name}: no linear is quantized.", name=checkpoint.name))
    widths = _widths(recipe, asked)
    units = _units(linears, recipe)
    weights = sum(x.in_features * x.out_features for x in linears)
    least, most = (_size(linears, recipe.of_width(width)) for width in (widths[0], widths[-1]))
    if asked.bpw is not None:
        bits = int((asked.bpw + _PRINTED) * weights)
    else:
        whole = 8 * memory.needs(checkpoint, spec, recipe.of_width(widths[0]), 0, 0).output
        bits = 8 * (asked.size or 0) - (whole - least)
    if not bits >= least:
        raise _too_small(asked, bits, least, most, weights)
    return Ladder(units, recipe, _uniform(recipe, spec, linears, widths, bits), widths, weights, bits)


def refuse_budget(checkpoint: Checkpoint, recipe: Recipe, asked: Budget) -> None:
    """Raises what `ladder` would, before torch is imported. A checkpoint without config.json is refused later."""
    config = checkpoint.value("config.json")
    if config is not None:
        ladder(checkpoint, build_spec(config, checkpoint.tensors), recipe, asked)


def _quantized(recipe: Recipe, linear: Linear) -> bool:
    return not is_kept(recipe, linear.name) and not unfit(recipe, linear.in_features, linear.out_features)


def _too_small(asked: Budget, bits: int, least: int, most: int, weights: int) -> DoctorError:
    reachable = _("{least:.3f} to {most:.3f} bits a weight can be reached", least=least / weights, most=most / weights)
    what = (
        _("--bpw {bpw:g}: {reachable}.", bpw=asked.bpw, reachable=reachable)
        if asked.bpw is not None
        else _(
            "--size {size:,} bytes: leaves {bpw:.3f} bits a weight; {reachable}, from {bytes:,} bytes on.",
            size=asked.size,
            bpw=max(bits, 0) / weights,
            reachable=reachable,
            bytes=(asked.size or 0) + -(-(least - bits) // 8),
        )
    )
    return DoctorError(what, _("Raise it, take larger groups, or allow smaller schemes with --schemes."))


def _widths(recipe: Recipe, asked: Budget) -> tuple[float, ...]:
    """The widths to choose from, rising. Raises DoctorError where there are not two."""
    form = format_of(recipe)
    known = widths_from(form.bits, form.wide)
    found = [b for b in asked.widths or known if asked.widths or b >= LEAST_BITS]
    strange = [b for b in found if b not in known]
    if strange:
        raise DoctorError(
            _(
                "--schemes: {label} has no {bits} bits; must be among {known}.",
                label=form.label,
                bits=strange[0],
                known=", ".join(map(str, form.bits)),
            )
        )
    served = [b for b in found if _read(recipe, int(b), recipe.group_size)]
    if len(set(served)) < 2:
        raise DoctorError(
            _(
                "--bpw: widths to choose from: {widths}; must be 2 or more.",
                widths=listed(map(str, served)) or _("none that {runtime} reads", runtime=recipe.runtime),
            ),
            _("Name more with --schemes, or another --runtime or --group-size."),
        )
    return tuple(sorted(set(served)))


def _read(recipe: Recipe, bits: int, group_size: int) -> bool:
    """Whether the recipe's runtime has a kernel; without a runtime, or a table of it, it is not asked."""
    try:
        entries = runtime_entries(recipe)
    except Unavailable:
        return True
    return bool(reads(entries, recipe.output_format, bits, group_size, bool(recipe.sym)))


def _uniform(recipe: Recipe, spec: ModelSpec, linears: list[Linear], widths: tuple[float, ...], bits: int) -> Recipe:
    """The recipe of one width, and then of the finest groups, that the budget holds; of GGUF the largest of llama.cpp's
    own mixtures and types.
    """
    if format_of(recipe).in_blocks:
        plain = [recipe.of_width(width) for width in widths]
        sizes = [(_size(linears, other), other) for one in plain for other in (one, with_mixture(one, spec))]
        return max((pair for pair in sizes if pair[0] <= bits), key=lambda pair: pair[0])[1]
    finer = [g for g in _GROUPS if recipe.group_size == -1 or g < recipe.group_size]
    groups = [recipe.group_size, *(g for g in finer if not any(x.in_features % g for x in linears))]
    found = [
        replace(recipe.of_width(width), group_size=group)
        for width in reversed(widths)
        for group in reversed(groups)
        if _read(recipe, int(width), group)
    ]
    return next(other for other in found if _size(linears, other) <= bits)


def _size(linears: Iterable[Linear], recipe: Recipe) -> int:
    form = format_of(recipe)
    return 8 * sum(form.bytes(x.in_features, x.out_features, recipe.for_linear(x.name).scheme) for x in linears)


def _units(linears: Iterable[Linear], recipe: Recipe) -> dict[Unit, tuple[Linear, ...]]:
    """Linears that engines store as one matrix, and all experts of a layer, which they compute in one kernel. GGUF
    joins nothing but a layer's experts of one role.
    """
    apart = "bits" not in format_of(recipe).joint
    found: dict[tuple, list[Linear]] = {}
    for x in linears:
        joined = (x.name,) if apart else next((roles for roles in FUSED if x.role in roles), (x.name,))
        experts = (x.block, "experts", x.role if apart else "")
        key = experts if x.expert is not None else (x.name.rpartition(".")[0], *joined)
        found.setdefault(key, []).append(x)
    return {tuple(x.name for x in unit): tuple(unit) for unit in found.values()}


def mixture(recipe: Recipe, named: Iterable[tuple[Iterable[Linear], float]]) -> Recipe:
    """The recipe that gives these linears these widths: that of most weights, and patterns for the others."""
    pairs = [(x, width) for linears, width in named for x in linears]
    weights: Counter[float] = Counter()
    for x, width in pairs:
        weights[width] += x.in_features * x.out_features
    common = max(weights, key=lambda width: (weights[width], -width))
    own: dict[tuple[str, str, float], list[int]] = {}
    for x, width in pairs:
        if width != common and x.block is not None:
            before, _dot, after = x.name.partition(f".{x.block}.")
            if x.expert is not None:
                after = after.replace(f".{x.expert}.", ".*.", 1)
            layers = own.setdefault((before, after, width), [])
            if x.block not in layers:
                layers.append(x.block)
    patterns = tuple(f"{before}.{_choice(layers)}.{after}={width}" for (before, after, width), layers in own.items())
    return replace(recipe.of_width(common), bits_for=patterns)


def _choice(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else "{" + ",".join(map(str, layers)) + "}"
