"""`--retry-failed`: the finished output of an earlier run, of which only the linears that fell back are solved again.

Everything else is carried over as it was written, to the byte. The earlier run must be of the same checkpoint, recipe
and versions; rows and damping may differ, since they are what a linear that fell back lacked.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from safetensors import safe_open

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import PlanRefused
from doctor.core.messages import _, plural
from doctor.core.methods import METHODS
from doctor.core.recipe import Recipe
from doctor.core.records import SolveRecord, damp_raised
from doctor.core.store import Store
from doctor.core.version import __version__
from doctor.fixing.receipt import RECEIPT
from doctor.formats.registry import format_of
from doctor.model.linears import Linear
from doctor.quant.forward.linear_groups import Modules
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.linear import put_weight
from doctor.quant.pack import unpack_linear
from doctor.quant.records import Record, put_facts, record
from doctor.quant.stage import differences

MAY_DIFFER = ("damp", "damp_max")
SAMPLE_BYTES = 512  # of each tensor: another training of the same class differs in every matrix that it touched


def versions() -> dict[str, str]:
    """What a run's numbers depend on beside its inputs."""
    return {"doctor": __version__, "torch": torch.__version__, "transformers": version("transformers")}


@dataclass(frozen=True)
class Earlier:
    """What an earlier run wrote. solved: the outcome of every linear that it quantized; failed: names of those that
    fell back. digest: sha256 of its receipt.
    """

    checkpoint: Checkpoint
    solved: Mapping[str, SolveRecord]
    failed: frozenset[str]
    digest: str

    @property
    def note(self) -> str:
        """For the receipt and the screen."""
        return plural(
            "retry: {n} linear that fell back is solved again, {rest} stay as an earlier run wrote them",
            "retry: {n} linears that fell back are solved again, {rest} stay as an earlier run wrote them",
            len(self.failed),
            rest=len(self.solved) - len(self.failed),
        )

    def fails_in(self, linears: Iterable[str]) -> bool:
        """Whether one of these linears is solved again."""
        return not self.failed.isdisjoint(linears)

    def tensors_of(self, names: Iterable[str], i: int) -> dict[str, torch.Tensor]:
        """Every tensor of decoder layer i as it was written. names: the layer's tensors in the source."""
        stems = tuple({name.partition(f".{i}.")[0] + f".{i}." for name in names})
        return self._read({name for name in self.checkpoint.tensors if name.startswith(stems)})

    def carry(
        self,
        skeleton: Skeleton,
        store: Store,
        i: int,
        recipe: Recipe,
        modules: Modules,
        records: list[Record],
        packed: dict[str, torch.Tensor],
    ) -> Modules:
        """Take layer i as it was written, but for the linears that fell back: into its modules, `packed`, `records` and
        the store. modules: its linears; returns those to solve again.
        """
        written = self.tensors_of(skeleton.tensors_of(i), i)
        again = {name: pair for name, pair in modules.items() if name in self.failed}
        for name, (linear, module) in modules.items():
            if name not in again:
                if name not in self.solved:
                    raise self._lacks(name)
                parts = {n: t.to(skeleton.device) for n, t in written.items() if n.rpartition(".")[0] == name}
                put_weight(module, partial(self._unpacked, linear, recipe, parts), linear.transposed)
                put_facts(store, name, self.solved[name], None)
                records.append(record(linear, self.solved[name], None, 0.0))
        for name, module in skeleton.by_tensor(i).items():  # norms, which a tuned output has its own of
            if name in written and written[name].ndim == 1 and written[name].is_floating_point():
                old = module.get_parameter("weight")
                old.data = written[name].to(old.device, old.dtype)
        packed |= {n: t for n, t in written.items() if n.rpartition(".")[0] not in again or n.endswith(".bias")}
        return again

    def outside(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors of no decoder layer as they were written. Raises PlanRefused where the output lacks one."""
        absent = next((name for name in names if name not in self.checkpoint.tensors), None)
        if absent is not None:
            raise self._lacks(absent)
        return self._read(set(names))

    def _read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        shards: dict[str, list[TensorInfo]] = {}
        for name, info in self.checkpoint.tensors.items():
            if name in names:
                shards.setdefault(info.shard, []).append(info)
        tensors: dict[str, torch.Tensor] = {}
        for shard, infos in sorted(shards.items()):
            with safe_open(self.checkpoint.root / shard, "pt") as file:
                for info in sorted(infos, key=lambda info: info.begin):
                    tensors[info.name] = file.get_tensor(info.name)
        return tensors

    def _lacks(self, name: str) -> PlanRefused:
        return PlanRefused(
            _("{path}: does not hold {linear} as its receipt says.", path=self.checkpoint.root, linear=name),
            _("Quantize anew into another directory."),
        )

    def _unpacked(self, linear: Linear, recipe: Recipe, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """W f32[n, k] of a linear as it was written. Raises PlanRefused where the output does not hold it."""
        shape = (linear.out_features, linear.in_features)
        try:
            W = unpack_linear(linear.name, parts, recipe.for_linear(linear.name), shape)
            if tuple(W.shape) == shape:
                return W
        except (KeyError, ValueError, IndexError, RuntimeError):  # parts that are absent, or of another size
            pass
        raise self._lacks(linear.name)


def open_earlier(output: Checkpoint, recipe: Recipe, source: str) -> Earlier:
    """The earlier run that wrote `output`. source: `source_mark` of the checkpoint that is quantized now. Raises
    PlanRefused where it is another run, where nothing fell back, or where linears cannot be solved one by one.
    """
    document = output.value(RECEIPT) or {}
    solved = {e["name"]: _solve(e["solve"]) for e in _entries(document)}
    if not solved:
        raise PlanRefused(
            _("{path}: holds no {receipt} of a run of `doctor quantize`.", path=output.root, receipt=RECEIPT),
            _("Give the output of such a run; an interrupted one goes on with --resume alone."),
        )
    _require_same(output, document, recipe, source)
    if recipe.folds_scales or format_of(recipe).in_blocks:
        raise PlanRefused(
            _(
                "--retry-failed: {method} in {format} changes other tensors with a linear; none is solved alone.",
                method=recipe.method,
                format=recipe.output_format,
            ),
            _("Quantize anew, with more rows."),
        )
    if recipe.vision:
        raise PlanRefused(
            _("--retry-failed: solves linears of decoder layers; {path} has a vision tower's too.", path=output.root),
            _("Quantize anew, with more rows."),
        )
    quantized = {name: found for name, found in solved.items() if found.outcome not in ("kept", "failed")}
    failed = frozenset(name for name, found in quantized.items() if fell_back(found, recipe))
    if not failed:
        raise PlanRefused(_("{path}: no linear fell back; there is nothing to solve again.", path=output.root))
    digest = hashlib.sha256(output.json[RECEIPT].raw).hexdigest()
    return Earlier(output, quantized, failed, digest)


def fell_back(solve: SolveRecord, recipe: Recipe) -> bool:
    """Whether a quantized linear is less than the recipe asked for: rounded instead of solved, or damped further."""
    simpler = solve.outcome in METHODS and solve.outcome != recipe.method
    return simpler or damp_raised(asdict(solve))


def source_mark(checkpoint: Checkpoint) -> str:
    """sha256 of what tells a checkpoint from others of its class, wherever it lies: config.json, the names, types and
    shapes of its tensors, and SAMPLE_BYTES from the middle of each.
    """
    base: Checkpoint = getattr(checkpoint, "source", checkpoint)  # of an edited view
    digest = hashlib.sha256(repr(getattr(checkpoint, "edits", ())).encode())
    digest.update(base.json["config.json"].raw if "config.json" in base.json else b"")
    for shard in base.shards.values():
        with base.open_file(shard.name) as file:
            for info in shard.tensors:
                middle = info.begin + info.nbytes // 2
                digest.update(repr((info.name, info.dtype.name, info.shape)).encode())
                digest.update(file.read(middle, min(SAMPLE_BYTES, info.end - middle)))
    return digest.hexdigest()


def _require_same(output: Checkpoint, document: Mapping[str, Any], recipe: Recipe, source: str) -> None:
    now: dict[str, Any] = {**versions(), "source": source, "recipe": {k: _plain(v) for k, v in asdict(recipe).items()}}
    before = {key: document.get(key) for key in now}
    if isinstance(before["recipe"], dict):
        before["recipe"] = {**before["recipe"], **{key: now["recipe"][key] for key in MAY_DIFFER}}
    found = differences(before, now)
    if found:
        raise PlanRefused(
            _("{path}: the run that wrote it differs in {what}.", path=output.root, what=", ".join(found)),
            _("Retry with the same checkpoint, recipe and versions; rows and damping may differ."),
        )


def _plain(value: Any) -> Any:
    """A field of a recipe as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _entries(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The linears of a receipt, which may come from anywhere: those that are what a run writes."""
    found = document.get("linears")
    return [
        e
        for e in (found if isinstance(found, list) else ())
        if isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("solve"), dict)
    ]


def _solve(stated: Mapping[str, Any]) -> SolveRecord:
    """The outcome in an entry of a receipt, in which NaN is a text."""

    def number(key: str) -> float:
        try:
            return float(stated.get(key, math.nan))
        except (TypeError, ValueError):
            return math.nan

    attempts = stated.get("attempts")
    return SolveRecord(
        str(stated.get("outcome", "")),
        number("damp_asked"),
        number("damp_used"),
        str(stated.get("precision", "")),
        number("loss"),
        number("rtn_loss"),
        tuple((float(a[0]), str(a[1]), str(a[2])) for a in attempts if _is_attempt(a))
        if isinstance(attempts, list)
        else (),
        str(stated.get("note", "")),
    )


def _is_attempt(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and isinstance(value[0], (int, float))
