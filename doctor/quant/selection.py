"""Which linears of a decoder layer are quantized, which stay in 16 bits and why, and what the output's config calls
those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.recipe import ASKED, Recipe, is_kept, matches, unfit
from doctor.core.records import SolveRecord
from doctor.formats.registry import format_of
from doctor.model.fused_experts import FusedExperts, experts_held, holds_experts
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.forward.linear_groups import Modules
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.records import FUSED_EXPERTS, Record, kept, record

_JOINED = (("q", "k", "v"), ("gate", "up"))  # roles that engines compute as one linear


@dataclass(frozen=True)
class Kept:
    """One linear, or one tensor of fused experts, that stays in 16 bits."""

    linear: Linear
    solved: SolveRecord

    @property
    def record(self) -> Record:
        return record(self.linear, self.solved, None, 0.0)


@dataclass(frozen=True)
class Selection:
    """modules: the linears of one decoder layer to quantize. kept: those that stay in 16 bits. fused: expert tensors
    that do.
    """

    modules: Modules
    kept: tuple[Kept, ...]
    fused: tuple[Kept, ...]


def select_linears(
    skeleton: Skeleton, checkpoint: Checkpoint, fused: Mapping[str, FusedExperts], recipe: Recipe, i: int
) -> Selection:
    """The linears of layer i under this recipe."""
    modules: Modules = {}
    staying = []
    placed = skeleton.modules_of(i)
    for name, linear in skeleton.linears.get(i, {}).items():
        reason = why_kept(recipe, linear) if name in placed else _("transformers has no linear of its own for it")
        if reason:
            staying.append(Kept(linear, kept(recipe, reason)))
        else:
            modules[name] = placed[name]
    return Selection(modules, tuple(staying), tuple(_fused_experts(skeleton, checkpoint, fused, recipe, i)))


def _fused_experts(
    skeleton: Skeleton, checkpoint: Checkpoint, fused: Mapping[str, FusedExperts], recipe: Recipe, i: int
) -> list[Kept]:
    """Tensors that hold several experts: they are no linears, so they stay in 16 bits, which the report says."""
    found = []
    known = {x.tensor for x in skeleton.linears.get(i, {}).values()}
    for name in skeleton.tensors_of(i):
        info = checkpoint.tensors[name]
        if name not in known and holds_experts(info, skeleton.spec.hidden):
            found.append(whole_experts(info, fused, recipe, i))
    return found


def whole_experts(info: TensorInfo, fused: Mapping[str, FusedExperts], recipe: Recipe, i: int) -> Kept:
    """A tensor of several experts of layer i that stays in 16 bits, and why."""
    module = info.name.removesuffix(".weight")
    why = fused[module].why if module in fused else _("no known form of fused experts fits it")
    linear = Linear(module, info.name, FUSED_EXPERTS, i, info.shape[-1], info.shape[-2])
    return Kept(linear, kept(recipe, experts_held(info, why)))


def why_kept(recipe: Recipe, linear: Linear) -> str:
    """Why a linear stays in 16 bits; "" where it is quantized."""
    own = recipe.for_linear(linear.name)
    return ASKED if is_kept(recipe, linear.name) else unfit(own, linear.in_features, linear.out_features)


def names_in_config(found: Record, fused: Mapping[str, FusedExperts], recipe: Recipe) -> list[str]:
    """The names under which the output's config lists a record that stays in 16 bits.

    Engines know fused experts by the module that holds the experts, and what more the format asks for.
    """
    name = found["name"]
    if found["role"] != FUSED_EXPERTS:
        return [name]
    stacks = fused.get(name)
    module = stacks.module if stacks else name.rpartition(".")[0]
    return format_of(recipe).names_of_kept(module)


def stays_unasked(found: Record, fused: Mapping[str, FusedExperts]) -> bool:
    """Whether a record is of fused experts that stay in 16 bits unasked: rule Q416 reports them."""
    stacks = fused.get(found["name"])
    return found["role"] == FUSED_EXPERTS and (stacks is None or stacks.why != ASKED)


def require_widths(spec: ModelSpec, recipe: Recipe) -> None:
    """Raises DoctorError where bits_for or schemes_for name no linear, or linears that engines join differ in width or
    scheme.
    """
    names = [x.name for x in spec.linears if x.block is not None and not is_kept(recipe, x.name)]
    for text in (*recipe.bits_for, *recipe.schemes_for):
        pattern, _equals, _own = text.rpartition("=")
        if not any(matches(pattern, name) for name in names):
            raise DoctorError(
                _("--override {text}: no linear that is quantized has such a name.", text=text),
                _("Names are like {names}.", names=", ".join(names[:2])),
            )
    if "bits" not in format_of(recipe).joint:
        return  # its readers join nothing
    joined: dict[tuple[str, int], set[Recipe]] = {}
    for x in spec.linears:
        part = next((i for i, roles in enumerate(_JOINED) if x.role in roles), None)
        if x.name in names and part is not None:
            widths = joined.setdefault((x.name.rpartition(".")[0], part), set())
            widths.add(recipe.for_linear(x.name))
            if len(widths) > 1:
                raise DoctorError(
                    _(
                        "--override {patterns}: {name} gets {scheme}, and engines join {roles} into one linear "
                        "of one scheme and width.",
                        patterns=", ".join((*recipe.bits_for, *recipe.schemes_for)),
                        name=x.name,
                        scheme=recipe.for_linear(x.name).label(),
                        roles=", ".join(_JOINED[part]),
                    ),
                    _("Name all of them in the pattern."),
                )
