"""The streaming run: one decoder block in memory, its linears quantized in the order in which they compute.

For each block: load its weights; let every batch run up to the linears that compute first, quantize those, put the
weights that an engine will read back in their place; go on to the next ones; at the end the outputs are those of the
block as it will be served, and go to the next block. So every linear is solved on what really reaches it, quantization
errors included, and a block is computed once (walk.py).

Linears that got the same tensor share a Hessian. Experts of a mixture each have their own; one that no calibration row
reached is rounded to nearest and says so.

Numbers become facts as they appear and are judged by the same rules as everything else; a finding of severity error
stops the run at that block. Memory is worked out in budget.py: what does not grow with the model's depth is always
held; hidden states and what halted passes hold go to disk where they exceed what the limit leaves (shelf.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import accumulate

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import CudaError, DoctorError, NotQuantizable
from doctor.core.facts import CHECKPOINT, Store
from doctor.core.finding import Finding
from doctor.core.recipe import ASKED, Recipe, is_kept, matches, unfit
from doctor.core.records import CalibrationFacts, HessianFacts, SolveRecord
from doctor.core.version import __version__
from doctor.fixing.plan import Consent, with_fields
from doctor.lint.engine import judge
from doctor.lint.rule import Rule
from doctor.model.fused_experts import find_stacks, take_apart
from doctor.model.spec import Linear, ModelSpec
from doctor.quant import budget, export
from doctor.quant.budget import BATCH_TOKENS, DEVICE_BATCH_TOKENS
from doctor.quant.distributed import Ranks, finite_json
from doctor.quant.forward.skeleton import Call, Skeleton, load_tensor
from doctor.quant.forward.spill import Shelf
from doctor.quant.forward.staged import WITHOUT_GREENLET, Input, Stages, Walk, discover, greenlet
from doctor.quant.solve import awq, cpu, kernels
from doctor.quant.solve.gptq import Solution, round_to_nearest, solve
from doctor.quant.solve.grid import Grid
from doctor.quant.solve.hessian import Attempt, mixed_products

# An exact fold moves float32 results by rounding only; a fold into something that is not linear moves them by percents.
_FOLD_TOLERANCE = 1e-3
STACKED = "experts"  # the role of a 3-D tensor of experts in a record
_JOINED = (("q", "k", "v"), ("gate", "up"))
RUN_STAGES = ("calibration", "run")
_SHARE_OF_DEVICE = 0.8  # of a GPU's free memory for halted passes, block and Hessians already taken off


@dataclass
class Result:
    """What a run did. records: one dict a linear (name, block, role, outcome, solve, hessian, seconds), in order.

    stopped: the findings that ended the run early; empty when every block was written.
    """

    records: list[dict] = field(default_factory=list)
    stopped: list[Finding] = field(default_factory=list)
    judged: list[Finding] = field(default_factory=list)  # all findings of the run's own rules so far
    kept: list[str] = field(default_factory=list)
    recipe: Recipe | None = None  # as it is at the end: fixes in the run change it
    fixes: list[str] = field(default_factory=list)  # what they were, one line each

    def count(self, outcome: str) -> int:
        return sum(r["outcome"] == outcome for r in self.records)


def fingerprint(checkpoint: Checkpoint, recipe: Recipe, rows: list[list[int]], device: str = "cpu") -> dict:
    """What must be equal for two runs to write the same bytes."""
    import transformers

    headers = [(t.name, t.dtype.name, t.shape) for t in checkpoint.tensors.values()]
    files = [
        (e.name, e.size, _modified(checkpoint, e.name))
        for e in checkpoint.entries.values()
        if e.name.endswith(".safetensors")
    ]
    source = repr(
        (sorted(headers), sorted(files), checkpoint.json["config.json"].raw, getattr(checkpoint, "edits", ()))
    )
    return {
        "doctor": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "recipe": {**asdict(recipe), "format": recipe.output_format},
        "rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "checkpoint": hashlib.sha256(source.encode()).hexdigest(),
        "device": torch.device(device).type,
    }


def _modified(checkpoint: Checkpoint, name: str) -> int:
    try:
        return os.stat(checkpoint.root / name).st_mtime_ns
    except OSError:
        return 0


def run(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: list[list[int]],
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    *,
    memory: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
    ranks: Ranks | None = None,
    consent: Consent | None = None,
) -> Result:
    """Quantize every decoder block into parts of `output`; blocks whose part is there already are replayed, not solved.

    consent: fixes of the recipe that are made as soon as a block asks for them; the block is then quantized again.
    rows: token ids (unused for rtn). memory: bytes that the process may take, None for a share of what is free. Facts
    go into `store`; rules of the stages calibration and run judge them after each block. Raises NotQuantizable where
    numbers forbid it and no rule says so.
    """
    job = _Run(checkpoint, spec, recipe, rows, output, store, rules, memory, progress, device, ranks or Ranks())
    job.consent = consent
    try:
        return job.go()
    finally:
        job.skeleton.stop_reading()


def try_blocks(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    rows: list[list[int]],
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    blocks: Iterable[int],
    *,
    memory: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
) -> tuple[Result, list[float]]:
    """(result, seconds of each) of quantizing only these blocks, each on what leaves the one before it in `blocks`."""
    job = _Run(checkpoint, spec, recipe, rows, output, store, rules, memory, progress, device)
    seconds = []
    if job.batches:
        job._first_inputs()
    for i in blocks:
        started = time.perf_counter()
        with torch.no_grad():
            job.result.records += job._block(i, ahead=False)
        seconds.append(time.perf_counter() - started)
        if job.result.stopped:
            break
        job._say(i, len(job.skeleton.blocks), job.result.records, seconds[-1])
    return job.result, seconds


def require_widths(spec: ModelSpec, recipe: Recipe) -> None:
    """Raises DoctorError where bits_for names no linear, or gives linears that engines join other widths."""
    names = [x.name for x in spec.linears if x.block is not None and not is_kept(recipe, x.name)]
    for text in recipe.bits_for:
        pattern, _, _ = text.rpartition("=")
        if not any(matches(pattern, name) for name in names):
            raise DoctorError(
                f"bits for {text}: no linear that is quantized has such a name.",
                f"Names are like {', '.join(names[:2])}.",
            )
    joined: dict[tuple, set[int]] = {}
    for x in spec.linears:
        part = next((i for i, roles in enumerate(_JOINED) if x.role in roles), None)
        if x.name in names and part is not None:
            widths = joined.setdefault((x.name.rpartition(".")[0], part), set())
            widths.add(recipe.for_linear(x.name).bits)
            if len(widths) > 1:
                raise DoctorError(
                    f"bits for {', '.join(recipe.bits_for)}: {x.name} gets {recipe.for_linear(x.name).bits} bits, and engines join "
                    f"{', '.join(_JOINED[part])} into one linear of one width.",
                    "Name all of them in the pattern.",
                )


class _Run:
    def __init__(self, checkpoint, spec, recipe, rows, output, store, rules, memory, progress, device, ranks=Ranks()):
        self.ranks = ranks
        self.whole = {
            name.removesuffix(".weight"): found
            for found in find_stacks(spec, checkpoint.tensors, recipe)
            for name in found.tensors
        }
        checkpoint, spec = take_apart(checkpoint, spec, recipe)
        self.checkpoint, self.spec, self.recipe, self.output, self.store = checkpoint, spec, recipe, output, store
        self.rules = [r for r in rules if r.stage in RUN_STAGES]
        require_widths(spec, recipe)
        self.progress, self.memory = progress, memory
        shown = [] if recipe.method == "rtn" else rows
        self.need = budget.needs(checkpoint, spec, recipe, len(shown), max(map(len, shown), default=0))
        self.skeleton = Skeleton(checkpoint, spec, device, computing_dtype(checkpoint, spec, recipe, device))
        self.batches = self._batches(rows) if recipe.method != "rtn" else []
        self.result = Result(recipe=recipe)
        self.consent: Consent | None = None
        self.wanted: list[Finding] = []
        self.calls: list[list[Call]] = []
        self.hidden: Hidden | None = None
        self.shelf: Shelf | None = None
        self.shelved = False  # whether that was said
        self.room = 0
        self.structures: dict[tuple, Stages] = {}
        self.stacked: list[tuple[str, str]] = []
        store.put(CHECKPOINT, "slower_paths", tuple(self._slower_paths()))
        self.folding: awq.Folding | None = None

    def go(self) -> Result:
        if self.batches:
            self._first_inputs()
        count = len(self.skeleton.blocks)
        for i in range(count):
            started = time.perf_counter()
            with torch.no_grad():
                records = self._replay(i) if self.output.has_part(_part(i)) else self._block(i)
            self.result.records += records
            if self.result.stopped:
                return self.result
            budget.give_back()
            self._say(i, count, records, time.perf_counter() - started)
        self._outside()
        return self.result

    def _load(self, i: int, ahead: bool = True) -> None:
        """Block i, and the next one on its way."""
        self.skeleton.load_block(i)
        if ahead:
            self.skeleton.read_ahead(i + 1)

    def _batches(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """This rank's batches; with several ranks they are small enough that each gets one."""
        tokens = BATCH_TOKENS if self.skeleton.device.type == "cpu" else DEVICE_BATCH_TOKENS
        if self.ranks.size == 1:
            return make_batches(rows, tokens)
        return self.ranks.mine(make_batches(rows, min(tokens, max(1, sum(map(len, rows)) // self.ranks.size))))

    def _first_inputs(self) -> None:
        left = budget.left(self.need, self.memory)
        for number, (inputs, calls) in enumerate(self.skeleton.open_calls(self.batches)):
            if self.hidden is None:
                shapes = [(*ids.shape, inputs.shape[-1]) for ids in self.batches]
                self.hidden = Hidden(
                    shapes, left, self._shelf, self.skeleton.device, self.skeleton.dtype, self._room() // 2
                )
                if self.hidden.on_disk:
                    self.progress(
                        f"hidden states take {self.hidden.nbytes / 2**30:.2f} GiB, more than {left / 2**30:.2f} GiB: kept on disk, in "
                        f"{self.output.stage}"
                    )
            self.hidden[number] = inputs
            self.calls.append(calls)
        self.room = left - (0 if self.hidden.on_disk or self.hidden.on_device else self.hidden.nbytes)

    def _slower_paths(self) -> list[str]:
        """What does the work another way than it could, and why."""
        device, found = self.skeleton.device, []
        if kernels.note(device):
            found.append(kernels.note(device))
        if device.type == "cuda" and self.skeleton.dtype == torch.bfloat16 and not mixed_products(device):
            found.append(
                "this torch has no product of bfloat16 with a float32 result: Hessians are summed from float32 copies"
            )
        if cpu.note(device):
            found.append(cpu.note(device))
        if self.batches and greenlet is None:
            found.append(WITHOUT_GREENLET)
        return found

    # one block

    def _block(self, i: int, ahead: bool = True) -> list[dict]:
        while True:
            self._load(i, ahead)
            modules, records = self._choose(i)
            packed: dict[str, torch.Tensor] = {}
            if not self.batches:
                records += [
                    self._quantize(linear, module, None, packed, self._try(linear, module, None))
                    for linear, module in modules.values()
                ]
                self._settle(records)
            else:
                self._sequence(i, modules, records, packed)
            if not self.wanted:
                break
            self._change_recipe(i)
        if not self.result.stopped:
            self._write(i, packed)
            self.output.note({"block": i, "records": records})
            self.skeleton.drop_block(i)
        return records

    def _sequence(self, i: int, modules: dict, records: list[dict], packed: dict[str, torch.Tensor]) -> None:
        """Stage after stage: take the inputs, quantize. Records, packed tensors and hidden states are changed."""
        seen = self._stages(i, modules)
        stages = seen.names(list(modules))
        if self.recipe.method == "awq":
            self.folding = self._fold(i, stages, modules)
            packed.update(self.folding.tensors())
        with self._walk(i, stages, modules, seen.halted_bytes) as walk:
            for number, stage in enumerate(stages):
                inputs = self._inputs(walk, number)
                names = [name for group in stage for name in group]
                own = {
                    name: self._try(*modules[name], inputs[name])
                    for place, name in enumerate(names)
                    if self.ranks.size > 1 and self.ranks.owner(place) == self.ranks.rank
                }
                for place, name in enumerate(names):
                    linear, module = modules[name]
                    tried = (
                        self._try(linear, module, inputs[name])
                        if self.ranks.size == 1
                        else self._exchange(self.ranks.owner(place), own.pop(name, None), linear)
                    )
                    records.append(self._quantize(linear, module, inputs[name], packed, tried))
                if any(r["outcome"] == "failed" for r in records):
                    break
            self._settle(records)
            if not self.result.stopped and not self.wanted:
                walk.finish()

    def _change_recipe(self, i: int) -> None:
        """Make the fixes that this block asks for. A recipe moves one way, so a block is tried again no more often than
        it has fixes.
        """
        for item in self.wanted:
            self.recipe = with_fields(self.recipe, item.fix.edits)
            self.result.fixes.append(f"{item.code} {item.fix.title}: {item.subject.partition(':')[2]}")
            self.progress(f"fix: {self.result.fixes[-1]}")
        self.wanted, self.result.recipe = [], self.recipe
        self.store.put(CHECKPOINT, "recipe", self.recipe)
        self.progress(f"block {i + 1} is quantized again")

    def _settle(self, records: list[dict]) -> None:
        """Judge a block's linears; raises NotQuantizable where one failed and no rule has anything to say
        (--select).
        """
        self._judge()
        here = {f"linear:{r['name']}" for r in records}
        self.wanted = [
            f
            for f in self.result.judged
            if f.subject in here
            and self.consent
            and self.consent.can_carry_out(f.fix)
            and self.consent.allows(f.code, f.fix)
            and with_fields(self.recipe, f.fix.edits) != self.recipe
            and not f.consequence_of
        ]
        if self.wanted:
            self.result.stopped = []
            return
        failed = next((r for r in records if r["outcome"] == "failed"), None)
        if failed and not self.result.stopped:
            raise NotQuantizable(
                f"{failed['name']}: {failed['solve']['note']}", "Run `doctor check` on the checkpoint."
            )

    def _fold(self, i: int, stages: list[list[list[str]]], modules: dict) -> awq.Folding:
        """AWQ's scales, found on the float block and folded into it. Taken back where the block's output moves."""
        folding = awq.Folding(
            modules, self.skeleton.by_tensor(i), lambda name: load_tensor(self.checkpoint, name).dtype
        )
        before = self.skeleton.run_block(i, self.hidden[0], self.calls[0][i])
        groups = [group for stage in stages for group in stage]
        with self._walk(i, [groups], modules) as walk:
            everything = self._inputs(walk, 0)
        for group in groups:
            seen = everything[group[0]]
            if seen.fact.tokens and seen.fact.finite:
                folding.apply(
                    self.spec,
                    group,
                    seen.H,
                    bits=self.recipe.bits,
                    group_size=self.recipe.group_size,
                    sym=self.recipe.sym,
                    zero_min=self._zero_min,
                )
        moved = (self.skeleton.run_block(i, self.hidden[0], self.calls[0][i]) - before).norm() / before.norm()
        if self.ranks.any(bool(folding.columns) and not moved <= _FOLD_TOLERANCE):
            folding.take_back(f"not scaled: folding moved the block's output by {float(moved):.2e}")
        return folding

    @property
    def _zero_min(self) -> int:
        return 1 if self.recipe.output_format == "gptq" else 0

    def _choose(self, i: int) -> tuple[dict[str, tuple[Linear, torch.nn.Module]], list[dict]]:
        """The linears of block i to quantize, and records of those that stay in 16 bits with the reason."""
        modules, records = {}, []
        placed = self.skeleton.modules_of(i)
        for name, linear in self.skeleton.linears.get(i, {}).items():
            reason = self._why_kept(linear) if name in placed else "transformers has no linear of its own for it"
            if reason:
                records.append(self._keep(linear, reason))
            else:
                modules[name] = placed[name]
        return modules, records + self._stacked(i)

    def _stacked(self, i: int) -> list[dict]:
        """Records of 3-D tensors of experts: no linears, so they stay in 16 bits, which nobody should have to find out
        alone.
        """
        records = []
        known = {x.tensor for x in self.skeleton.linears.get(i, {}).values()}
        for name in self.skeleton.tensors_of(i):
            shape = self.checkpoint.tensors[name].shape
            if name in known or not re.search("expert|moe", name) or len(shape) != 3 or min(shape[1:]) < 2:
                continue
            module = name.removesuffix(".weight")
            why = self.whole[module].why if module in self.whole else "no known form of stacks fits it"
            reason = f"{shape[0]} experts in one tensor {list(shape)}; {why}"
            solved = SolveRecord("kept", self.recipe.damp, 0.0, "", 0.0, 0.0, (), reason)
            record = _line(Linear(module, name, STACKED, i, shape[2], shape[1]), solved, None, 0.0)
            self._note_kept(record)
            records.append(record)
        return records

    def _note_kept(self, record: dict) -> None:
        """Into the list of what the output's config names as 16 bits; engines know a stack by the module that holds the
        experts.

        vLLM asks compressed-tensors for the linears that would be in the module.
        """
        names = [record["name"]]
        if record["role"] == STACKED:
            found = self.whole.get(names[0])
            if (found is None or found.why != ASKED) and names[0] not in dict(self.stacked):
                self.stacked.append((names[0], record["solve"]["note"]))
            names = [found.module if found else names[0].rpartition(".")[0]]
            names += [rf"re:^{re.escape(names[0])}\."] * (self.recipe.output_format == "compressed-tensors")
        self.result.kept += [name for name in names if name not in self.result.kept]

    def _why_kept(self, linear: Linear) -> str:
        return (
            ASKED if is_kept(self.recipe, linear.name) else unfit(self.recipe, linear.in_features, linear.out_features)
        )

    def _keep(self, linear: Linear, reason: str) -> dict:
        solved = SolveRecord("kept", self.recipe.damp, 0.0, "", 0.0, 0.0, (), reason)
        record = self._record(linear, solved, None, 0.0)
        self._note_kept(record)
        return record

    def _stages(self, i: int, modules: dict) -> Stages:
        """Stages of block i, seen once for all blocks of one structure."""
        key = (
            self.skeleton.kind_of(i),
            *(re.sub(rf"\.{i}\.", ".#.", name, count=1) for name in modules),
            *((x.in_features, x.out_features) for x, _ in modules.values()),
        )
        if key not in self.structures:
            # The longest batch: how much a halted pass holds may grow with the square of the length.
            found = discover(self.skeleton, i, self.hidden[len(self.calls) - 1], self.calls[-1][i], modules)
            groups, held = self.ranks.tell(
                0, [found.groups, found.halted_bytes]
            )  # experts of one rank's rows may miss in another's
            self.structures[key] = Stages(tuple(tuple(map(tuple, stage)) for stage in groups), held)
        return self.structures[key]

    def _walk(self, i: int, stages: list[list[list[str]]], modules: dict, halted_bytes: float = float("inf")) -> Walk:
        """A walk in which the stages are halts; by default one in which no pass is kept between them."""
        room, calls = self._room(), [calls[i] for calls in self.calls]
        tokens = sum(batch.numel() for batch in self.batches)
        if self.hidden.on_disk:  # then a pass holds its input too
            halted_bytes += self.hidden.nbytes / tokens
        held = halted_bytes * tokens
        shelf = self._shelf() if room < held < float("inf") and self.skeleton.device.type == "cpu" else None
        if shelf and not self.shelved:
            self.shelved = True
            self.progress(
                f"halted passes hold {held / 2**30:.2f} GiB, more than {room / 2**30:.2f} GiB: the rest on disk, in {self.output.stage}"
            )
        return Walk(
            self.skeleton, i, self.hidden, calls, stages, modules, room=room, halted_bytes=halted_bytes, shelf=shelf
        )

    def _shelf(self) -> Shelf:
        """Of this run, made when first needed."""
        if self.shelf is None:
            self.shelf = Shelf(self.output.stage)
        return self.shelf

    def _room(self) -> int:
        """Bytes for halted passes, where they are computed."""
        if self.skeleton.device.type != "cuda":
            return self.room
        free = torch.cuda.mem_get_info(self.skeleton.device)[0]
        return int(_SHARE_OF_DEVICE * max(0, free - self.need.hessians - self.need.solving - self.need.device_batch))

    def _inputs(self, walk: Walk, number: int) -> dict[str, Input]:
        """What the linears of a stage get as input, by name; linears of one group have one object."""
        budget.give_back()
        hessians, found = walk.hessians(number), {}
        for group in walk.stages[number]:
            self.ranks.sum(hessians[0])
            seen = Input(hessians.pop(0), self.recipe.damp)  # popped: sums and matrix of one group at a time
            found.update(dict.fromkeys(group, seen))
        return found

    def _try(self, linear: Linear, module: torch.nn.Module, seen: Input | None) -> tuple[Solution | str, float]:
        """(solution, or why there is none, seconds)."""
        started = time.perf_counter()
        try:
            solution = self._solve(linear, module, seen)
        except NotQuantizable as error:
            solution = error.message
        return solution, time.perf_counter() - started

    def _exchange(
        self, owner: int, own: tuple[Solution | str, float] | None, linear: Linear
    ) -> tuple[Solution | str, float]:
        """What rank `owner` found for the linear, on every rank."""
        ranks, device = self.ranks, self.skeleton.device
        solution, seconds = own or (None, 0.0)
        said = None
        if isinstance(solution, str):
            said = [solution, seconds]
        elif solution is not None:
            said = [
                None,
                seconds,
                solution.outcome,
                finite_json(solution.loss),
                finite_json(solution.rtn_loss),
                [asdict(a) for a in solution.attempts],
                list(solution.grid.scale.shape),
            ]
        said = ranks.tell(owner, said)
        if said[0] is not None:
            return said[0], said[1]
        n, k = linear.out_features, linear.in_features
        codes = ranks.give(owner, solution and solution.codes, (n, k), torch.uint8, device)
        scale = ranks.give(owner, solution and solution.grid.scale, tuple(said[6]), torch.float32, device)
        zero = ranks.give(owner, solution and solution.grid.zero, tuple(said[6]), torch.int32, device)
        g_idx = ranks.give(owner, solution and solution.g_idx, (k,), torch.int32, device)
        loss, rtn_loss = (float("nan") if x is None else x for x in said[3:5])
        return Solution(
            codes, Grid(scale, zero), g_idx, said[2], loss, rtn_loss, tuple(Attempt(**a) for a in said[5])
        ), said[1]

    def _quantize(
        self,
        linear: Linear,
        module: torch.nn.Module,
        seen: Input | None,
        packed: dict[str, torch.Tensor],
        tried: tuple[Solution | str, float],
    ) -> dict:
        """One linear: its packed tensors into `packed`, what an engine reads back into the module, its record as the
        result.
        """
        solution, seconds = tried
        started = time.perf_counter()
        try:
            if isinstance(solution, str):
                raise NotQuantizable(solution)
            recipe = self.recipe.for_linear(linear.name)
            parts = export.pack_linear(linear.name, solution.codes, solution.grid, solution.g_idx, recipe)
        except NotQuantizable as error:
            failed = SolveRecord("failed", self.recipe.damp, 0.0, "", float("nan"), float("nan"), (), error.message)
            return self._record(linear, failed, seen and seen.fact, seconds)
        W = solution.weight()
        if W.is_cuda and not torch.equal(export.unpack_linear(linear.name, parts, recipe), W):
            raise CudaError(
                f"{linear.name}: the words that were packed on {W.device} do not read back as the weights that were meant.",
                "Set DOCTOR_KERNELS=0 to quantize with torch, and report this text.",
            )
        packed.update({name: part.cpu() for name, part in parts.items()})
        put_weight(module, W, linear.transposed)
        return self._record(
            linear,
            self._solve_fact(linear.name, solution, seen),
            seen and seen.fact,
            seconds + time.perf_counter() - started,
        )

    def _solve(self, linear: Linear, module: torch.nn.Module, seen: Input | None) -> Solution:
        W = module.weight.detach()
        W = W.T.contiguous() if linear.transposed else W
        r = self.recipe.for_linear(linear.name)
        options = {"bits": r.bits, "group_size": r.group_size, "sym": r.sym, "mse": r.mse, "zero_min": self._zero_min}
        if seen is None or not seen.fact.tokens:
            return round_to_nearest(W, **options)
        if r.method == "awq":
            del options["mse"]
            return awq.solve(W, seen.H, self.folding.columns.get(linear.name), damp=r.damp, **options)
        return solve(W, seen.H, act_order=r.act_order, damp=r.damp, damp_max=r.damp_max, **options)

    def _solve_fact(self, name: str, solution: Solution, seen: Input | None) -> SolveRecord:
        attempts = tuple((a.damp, a.precision, a.outcome) for a in solution.attempts)
        note = ""
        if solution.outcome == "awq":
            note = self.folding.notes.get(name, "")
        if solution.outcome == "rtn" and self.recipe.method != "rtn":
            note = (
                "no calibration row reached it"
                if seen is None or not seen.fact.tokens
                else "its Hessian could not be factored"
            )
        used = solution.attempts[-1] if solution.attempts and solution.outcome == "gptq" else None
        return SolveRecord(
            solution.outcome,
            self.recipe.damp,
            used.damp if used else 0.0,
            used.precision if used else "",
            solution.loss,
            solution.rtn_loss,
            attempts,
            note,
        )

    def _record(self, linear: Linear, solved: SolveRecord, hessian: HessianFacts | None, seconds: float) -> dict:
        """Facts into the store, and the linear's line of the report."""
        self._facts(linear.name, solved, hessian)
        return _line(linear, solved, hessian, seconds)

    def _facts(self, name: str, solved: SolveRecord, hessian: HessianFacts | None) -> None:
        self.store.put(f"linear:{name}", "solve", solved)
        if hessian is not None:
            self.store.put(f"linear:{name}", "hessian", hessian)

    def _judge(self) -> None:
        findings, _ = judge(self.store, self.rules)
        self.result.judged = findings
        self.result.stopped = [f for f in findings if f.severity == "error"]

    def _forward(self, i: int) -> None:
        """Outputs of the finished block in the place of its inputs."""
        for number, calls in enumerate(self.calls):
            self.hidden[number] = self.skeleton.run_block(i, self.hidden[number], calls[i])

    def _write(self, i: int, packed: dict[str, torch.Tensor]) -> None:
        replaced = {
            linear.tensor for name, linear in self.skeleton.linears.get(i, {}).items() if name not in self.result.kept
        }
        names = [n for n in self.skeleton.tensors_of(i) if n not in replaced and n not in packed]
        self.output.write_part(
            _part(i), {**packed, **dict(export.kept_tensors(names, lambda n: load_tensor(self.checkpoint, n)))}
        )

    def _replay(self, i: int) -> list[dict]:
        """A block that an earlier run finished: its facts again, and its outputs from the weights it wrote."""
        noted = next((n["records"] for n in self.output.notes() if n.get("block") == i), None)
        if noted is None:  # the part was written, the journal line was not: solve it again, which writes the same part
            return self._block(i)
        block_names = self.skeleton.linears.get(i, {})
        for record in noted:
            if record["solve"]["damp_asked"] > self.recipe.damp:  # a fix raised it in the run that is resumed
                self.recipe = self.result.recipe = self.recipe.with_field("damp", record["solve"]["damp_asked"])
            if record["role"] != STACKED:
                self._facts(record["name"], _solve_of(record["solve"]), _hessian_of(record["hessian"]))
            if record["outcome"] == "kept":
                self._note_kept(record)
        if self.batches:
            self._load(i)
            tensors = {name: t.to(self.skeleton.device) for name, t in self.output.read_part(_part(i)).items()}
            for name, (linear, module) in self.skeleton.modules_of(i).items():
                if name in block_names and name not in self.result.kept:
                    put_weight(
                        module, export.unpack_linear(name, tensors, self.recipe.for_linear(name)), linear.transposed
                    )
            if self.recipe.method == "awq":
                self._put_folded(i, tensors)
            self._forward(i)
            self.skeleton.drop_block(i)
        return noted

    def _put_folded(self, i: int, tensors: dict[str, torch.Tensor]) -> None:
        """Norms and biases as an earlier run wrote them into the block."""
        for name, module in self.skeleton.by_tensor(i).items():
            for kind, tensor in (("weight", name), ("bias", name.removesuffix("weight") + "bias")):
                if tensor in tensors:
                    old = module._parameters[kind]
                    old.data = tensors[tensor].to(old.device, old.dtype)

    # around the blocks

    def _outside(self) -> None:
        """Everything that belongs to no block, unchanged; linears among it stay in 16 bits and are recorded."""
        names = self.skeleton.outer_tensors()
        blocks = range(len(self.skeleton.blocks))
        for linear in self.spec.linears:
            if linear.block not in blocks:
                self.result.records.append(self._keep(linear, "not in a decoder block that calibration runs through"))
        if not self.output.has_part("outside"):
            self.output.write_part(
                "outside", dict(export.kept_tensors(names, lambda n: load_tensor(self.checkpoint, n)))
            )
        self.store.put(CHECKPOINT, "stacked_experts", tuple(self.stacked))
        self._judge()

    def _say(self, i: int, count: int, records: list[dict], seconds: float) -> None:
        losses = [r["solve"]["loss"] for r in records if r["outcome"] in ("gptq", "awq")]
        worst = f", largest relative error {max(losses):.2%}" if losses else ""
        raised = [r["name"] for r in records if r["solve"]["damp_used"] > self.recipe.damp]
        raised = f"; damp raised: {', '.join(raised)}" if raised else ""
        self.progress(
            f"block {i + 1} of {count}: {sum(r['outcome'] in ('gptq', 'awq', 'rtn') for r in records)} linears in {seconds:.1f} s{worst}{raised}"
        )


def _line(linear: Linear, solved: SolveRecord, hessian: HessianFacts | None, seconds: float) -> dict:
    """A linear's line of the report."""
    return {
        "name": linear.name,
        "block": linear.block,
        "role": linear.role,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "outcome": solved.outcome,
        "solve": asdict(solved),
        "hessian": None if hessian is None else asdict(hessian),
        "seconds": round(seconds, 3),
    }


def put_weight(module: torch.nn.Module, W: torch.Tensor, transposed: bool) -> None:
    """W [out, in] in the place of the module's weight, in its dtype and on its device."""
    old = module.weight
    module.weight.data = (W.T if transposed else W).to(old.device, old.dtype).contiguous()


def computing_dtype(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, device: str) -> torch.dtype:
    """What blocks compute in: bfloat16 where a GPU quantizes by gptq a model whose blocks are stored so, as engines
    will serve it, since products of bfloat16 are exact in the float32 sums of a Hessian and ten times as fast there.
    Else float32: what awq folds needs the digits, and float16 ends where the activations of a model that was trained in
    bfloat16 may not.
    """
    stored = {
        checkpoint.tensors[x.tensor].dtype.name
        for x in spec.linears
        if x.block is not None and x.tensor in checkpoint.tensors
    }
    return (
        torch.bfloat16
        if torch.device(device).type == "cuda" and recipe.method == "gptq" and stored == {"BF16"}
        else torch.float32
    )


def computing_note(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, device: str) -> str:
    """One line for a run's notes where blocks compute in fewer digits than a CPU's run of the same recipe; empty
    elsewhere.
    """
    dtype = computing_dtype(checkpoint, spec, recipe, device)
    if dtype == torch.float32:
        return ""
    return (
        f"blocks compute in {str(dtype)[6:]} on {torch.device(device).type}, as they are stored, and in float32 on a CPU: codes and losses "
        "differ a little from a CPU's"
    )


class Hidden:
    """Hidden states [rows, length, hidden] of every batch, given and taken on `device`: they lie there where they take
    at most `room` bytes, else in memory, or on a shelf above `limit` bytes.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int, int]],
        limit: int,
        shelf: Callable[[], Shelf],
        device: torch.device = torch.device("cpu"),
        dtype: torch.dtype = torch.float32,
        room: int = 0,
    ):
        self._shapes, self._device, self._dtype = shapes, device, dtype
        sizes = [rows * length * hidden for rows, length, hidden in shapes]
        self._ends = list(accumulate(sizes))
        total = self.nbytes = dtype.itemsize * sum(sizes)
        self.on_device = device.type != "cpu" and total <= room
        self.on_disk = not self.on_device and total > limit
        if self.on_disk:
            self._shelf = shelf()
            self._place = self._shelf.reserve(total)
        else:
            self._all = torch.empty(sum(sizes), dtype=dtype, device=device if self.on_device else "cpu")

    def _begin(self, i: int) -> int:
        """The first element of batch i."""
        rows, length, hidden = self._shapes[i]
        return self._ends[i] - rows * length * hidden

    def _part(self, i: int) -> torch.Tensor:
        return self._all[self._begin(i) : self._ends[i]].view(self._shapes[i])

    def _where(self, i: int) -> int:
        return self._place + self._dtype.itemsize * self._begin(i)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not self.on_disk:
            return self._part(i).to(self._device)
        found = torch.empty(self._shapes[i], dtype=self._dtype)
        self._shelf.read(self._where(i), found.untyped_storage())
        return found.to(self._device)

    def __setitem__(self, i: int, value: torch.Tensor) -> None:
        if self.on_disk:
            # a copy where the tensor is not the whole of its storage
            whole = torch.empty(self._shapes[i], dtype=self._dtype).copy_(value)
            self._shelf.write(self._where(i), whole.untyped_storage())
        else:
            self._part(i).copy_(value)


def make_batches(rows: list[list[int]], tokens: int) -> list[torch.Tensor]:
    """Batches int64[rows, length] of equally long rows, about `tokens` each, in the order of the rows: no padding."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        last = batches[-1] if batches else None
        if last is None or len(last[0]) != len(row) or (len(last) + 1) * len(row) > tokens:
            batches.append([row])
        else:
            last.append(row)
    return [torch.tensor(batch, dtype=torch.int64) for batch in batches]


def receipt(recipe: Recipe, calibration: CalibrationFacts | None, result: Result, notes: list[str]) -> dict:
    """doctor.json: how this checkpoint was made, without times, so that the same run writes the same bytes."""
    import transformers

    linears = [{k: r[k] for k in ("name", "outcome", "solve")} for r in result.records]
    outcomes = {o: result.count(o) for o in sorted({r["outcome"] for r in result.records})}
    return json.loads(
        json.dumps(
            {
                "doctor": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "recipe": asdict(recipe),
                "calibration": None if calibration is None else asdict(calibration),
                "notes": notes,
                "outcomes": outcomes,
                "linears": _finite(linears),
            }
        )
    )


def _finite(value: object) -> object:
    """NaN and Inf as strings: JSON has neither."""
    if isinstance(value, float) and not torch.isfinite(torch.tensor(value)):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _part(i: int) -> str:
    return f"{i:05d}"


def _solve_of(data: dict) -> SolveRecord:
    return SolveRecord(**{**data, "attempts": tuple(tuple(a) for a in data["attempts"])})


def _hessian_of(data: dict | None) -> HessianFacts | None:
    if data is None:
        return None
    first = data["first_nonfinite"]
    return HessianFacts(**{**data, "first_nonfinite": tuple(first) if first else None})
