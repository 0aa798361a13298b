"""What a run needs before its first decoder layer, made once and then only read: model, rows, rules, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.records import SLOWER_PATHS
from doctor.core.store import Store
from doctor.fixing.consent import Consent
from doctor.formats.known import streams
from doctor.lint.rule import Rule
from doctor.model.fused_experts import FusedExperts, find_fused_experts, unfuse
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant import budget, export
from doctor.quant.budget import Need
from doctor.quant.device import device_free
from doctor.quant.distributed import Ranks
from doctor.quant.earlier import Earlier
from doctor.quant.forward.hidden_states import inputs_of_batches, make_batches
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.forward.suspended import WITHOUT_GREENLET, greenlet
from doctor.quant.selection import require_widths, why_kept
from doctor.quant.solve import cpu, cuda
from doctor.quant.solve.ggml import BlockSolution
from doctor.quant.solve.hessian import mixed_products
from doctor.quant.solve.solution import Solution

BATCH_TOKENS, DEVICE_BATCH_TOKENS = budget.BATCH_TOKENS, budget.DEVICE_BATCH_TOKENS
EXPERTS_AT_ONCE = 1  # whose Hessians are in memory together; more changes neither the time nor a byte
RUN_STAGES = ("calibration", "run")  # stages of the rules that judge a run

Progress = Callable[[str], None]
Solved = Solution | BlockSolution


class Survey(Protocol):
    """What looks on while a run quantizes, at a linear whose module still has its float weight."""

    def see(self, linear: Linear, W: torch.Tensor, given: LayerInput | None, solved: Solved | None) -> None:
        """W f32[n, k]; given: its input, None without calibration; solved: None where it could not be."""


@dataclass(frozen=True)
class Setup:
    """A run's fixed part.

    fused: fused expert tensors of the checkpoint, by the name of their module. spec and checkpoint have their experts
    unfused. batches: this rank's calibration batches int64[rows, length], [] where the method takes none. memory:
    bytes that the process may take, None for a share of what is free. consent: fixes of the recipe that may be made
    during the run. seen: what the processor made of rows with images or sound, by the number of their batch. survey:
    what looks on, None for nothing. vision: linears of vision towers that are quantized too. earlier: the finished
    output whose failed linears alone are solved; None for a whole run.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    output: export.Output
    store: Store
    rules: tuple[Rule, ...]
    memory: int | None
    progress: Progress
    ranks: Ranks
    consent: Consent | None
    fused: dict[str, FusedExperts]
    need: Need
    skeleton: Skeleton
    batches: list[torch.Tensor]
    seen: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    survey: Survey | None = None
    reads_ahead: bool = True  # whether the next decoder layer is read while one computes
    vision: tuple[Linear, ...] = ()
    earlier: Earlier | None = None


def set_up(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: list[list[int]],
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    *,
    memory: int | None,
    progress: Progress,
    device: str,
    ranks: Ranks,
    consent: Consent | None,
    survey: Survey | None = None,
    vision: tuple[Linear, ...] = (),
    earlier: Earlier | None = None,
) -> Setup:
    """Reads headers and builds the model on the meta device. Raises DoctorError where widths do not fit,
    NotQuantizable.
    """
    fused = {
        name.removesuffix(".weight"): stacks
        for stacks in find_fused_experts(spec, checkpoint.tensors, recipe)
        for name in stacks.tensors
    }
    checkpoint, spec = unfuse(checkpoint, spec, recipe)
    require_widths(spec, recipe)
    calibrated = recipe.calibrated
    shown = rows if calibrated else []
    free = device_free(device) if survey is None else None  # a survey takes whole Hessians
    need = budget.needs(checkpoint, spec, recipe, len(shown), max(map(len, shown), default=0), memory, free)
    skeleton = Skeleton(
        checkpoint,
        spec,
        device,
        computing_dtype(checkpoint, spec, recipe, device),
        on_demand=partial(_on_demand, recipe) if torch.device(device).type == "cpu" or need.hosted else None,
        experts_at_once=max(EXPERTS_AT_ONCE, ranks.size),  # every rank has one to solve
    )
    tokens = BATCH_TOKENS if skeleton.device.type == "cpu" or need.hosted else DEVICE_BATCH_TOKENS
    batches = _local_batches(rows, tokens, ranks) if calibrated else []
    seen = inputs_of_batches(rows, tokens) if calibrated else {}
    if seen and ranks.size > 1:
        raise DoctorError(
            _("calibration: rows with images are computed by one process; there are {n}.", n=ranks.size),
            _("Run without torchrun, or calibrate on text."),
        )
    store.put(SLOWER_PATHS, tuple(_slower_paths(skeleton, bool(batches), need)))
    own = tuple(r for r in rules if r.cost in RUN_STAGES)
    return Setup(
        checkpoint,
        spec,
        output,
        store,
        own,
        memory,
        progress,
        ranks,
        consent,
        fused,
        need,
        skeleton,
        batches,
        seen,
        survey,
        budget.reads_ahead(need, memory),
        vision,
        earlier,
    )


def _on_demand(recipe: Recipe, linear: Linear) -> bool:
    """Whether a linear's weight stays in the checkpoint until it computes: experts that are quantized, which need it
    a few times only.
    """
    return linear.expert is not None and not why_kept(recipe, linear)


def _local_batches(rows: list[list[int]], tokens: int, ranks: Ranks) -> list[torch.Tensor]:
    """This rank's batches of at most `tokens`; with several ranks they are small enough that each gets one."""
    if ranks.size == 1:
        return make_batches(rows, tokens)
    return ranks.local_batches(make_batches(rows, min(tokens, max(1, sum(map(len, rows)) // ranks.size))))


def _slower_paths(skeleton: Skeleton, calibrated: bool, need: budget.Need) -> list[str]:
    """What runs on a slower path than it could, and why."""
    device, found = skeleton.device, []
    if cuda.note(device):
        found.append(cuda.note(device))
    if device.type == "cuda" and skeleton.dtype == torch.bfloat16 and not mixed_products(device):
        found.append(
            _("this torch has no product of bfloat16 with a float32 result: Hessians are summed from float32 copies")
        )
    if need.hosted:
        found.append(
            _(
                "{device} does not hold the Hessians ({hessians}) and what solving takes: they lie in the host's "
                "memory, and rows of them are copied over",
                device=str(device),
                hessians=budget.gib(need.hessians),
            )
        )
    if cpu.note(device):
        found.append(cpu.note(device))
    if calibrated and greenlet is None:
        found.append(WITHOUT_GREENLET)
    return found


def computing_dtype(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, device: str) -> torch.dtype:
    """What decoder layers compute in.

    bfloat16 where a GPU quantizes by GPTQ a model whose layers are stored so, as engines will serve it: products of
    bfloat16 are exact in the float32 sums of a Hessian, and ten times as fast there. Else float32: what AWQ folds
    needs the digits, and float16 may overflow on the activations of a model that was trained in bfloat16.
    """
    stored = {
        checkpoint.tensors[x.tensor].dtype.name
        for x in spec.linears
        if x.block is not None and x.tensor in checkpoint.tensors
    }
    low = torch.device(device).type == "cuda" and recipe.solver.low_precision and stored == {"BF16"}
    return torch.bfloat16 if low else torch.float32


def computing_note(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, device: str) -> str:
    """A note where decoder layers compute in fewer digits than a CPU's run of the same recipe; "" elsewhere."""
    dtype = computing_dtype(checkpoint, spec, recipe, device)
    if dtype == torch.float32:
        return ""
    return _(
        "decoder layers compute in {dtype} on {device}, as they are stored, and in float32 on a CPU: codes and "
        "losses differ a little "
        "from a CPU's",
        dtype=str(dtype)[6:],
        device=torch.device(device).type,
    )


def computing_notes(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, device: str) -> list[str]:
    """Notes on where and in which digits a run computes."""
    if not streams(recipe):
        return [note for note in (cpu.note(device), computing_note(checkpoint, spec, recipe, device)) if note]
    found = [cpu.note("cpu")] if cpu.note("cpu") else []
    if torch.device(device).type != "cpu":
        found.append(_("weights are rounded as they are read, on the processor: {device} is not used", device=device))
    return found
