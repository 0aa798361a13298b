"""One assessment of a checkpoint or an overlay: its facts, its findings, and how each rule ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import Shard
from doctor.core.facts import COSTS, asks
from doctor.core.finding import Finding
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.lint.engine import RuleRun, judge, locate
from doctor.lint.rule import Rule
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.scan.header import header_facts
from doctor.scan.scan import scan
from doctor.scan.value_facts import DIGESTS

Progress = Callable[[str, int], None]
# (findings, runs, checkpoint) -> config.Hushed: takes out what the user suppressed
Suppress = Callable[[list[Finding], list[RuleRun], Checkpoint], Any]


def no_progress(phase: str, n: int) -> None:
    """Progress that nobody watches. phase: "fetch", "scan", "write" or "verify"; n: bytes since the last call."""


@dataclass
class Assessment:
    """The facts and findings of one state of the files."""

    checkpoint: Checkpoint
    store: Store
    findings: list[Finding]
    runs: list[RuleRun]
    bytes_read: int = 0
    bytes_known: int = 0  # of all tensors whose values are known, read now or by an earlier assessment
    skipped: dict[str, str] = field(default_factory=dict)
    suppressed: list[Finding] = field(default_factory=list)


def assess(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rules: list[Rule],
    *,
    facts: Iterable[tuple[str, str, object]] = (),
    stage: str = COSTS[-1],
    before: Assessment | None = None,
    touched: Iterable[str] = (),
    progress: Callable[[int], None] = lambda n: None,
    suppress: Suppress | None = None,
) -> Assessment:
    """Scan a checkpoint and run all rules on it.

    before: an earlier assessment; only tensors that are new, changed shape or are `touched` are read again. suppress:
    what it takes out is neither reported nor fixed.
    """
    store = header_facts(checkpoint, recipe)
    for subject, name, value in facts:
        store.put_value(name, value, subject)
    result = Assessment(checkpoint, store, [], [])
    if COSTS.index(stage) >= COSTS.index("values") and any(asks("values", r.facts) for r in rules):
        part = checkpoint
        if before is not None:
            kept = _carry(checkpoint, store, before, set(touched))
            part = cast(Checkpoint, _Part(checkpoint, kept))
            result.skipped = {n: why for n, why in before.skipped.items() if n in kept}
        scanned = scan(part, store, progress)
        result.bytes_read = scanned.bytes_read
        result.bytes_known = scanned.bytes_read + (
            checkpoint.total_bytes - sum(t.nbytes for s in part.shards.values() for t in s.tensors)
        )
        result.skipped |= scanned.skipped
    findings, result.runs = judge(store, rules, stage)
    result.findings = locate(findings, checkpoint)
    if suppress is not None:
        split = suppress(result.findings, result.runs, checkpoint)
        result.findings, result.suppressed = split.findings, split.suppressed
    return result


class _Part:
    """What the scan needs of a checkpoint, without the tensors whose facts are known."""

    def __init__(self, checkpoint: Checkpoint, known: set[str]):
        self.tensors, self.open_file, self.gguf = checkpoint.tensors, checkpoint.open_file, checkpoint.gguf
        self.shards = {
            n: Shard(n, s.size, s.header_bytes, [t for t in s.tensors if t.name not in known])
            for n, s in checkpoint.shards.items()
        }


def _carry(checkpoint: Checkpoint, store: Store, before: Assessment, touched: set[str]) -> set[str]:
    """Copy the facts of tensors that did not change from the last assessment; returns their names."""
    linears, old_linears = _linears(store), _linears(before.store)
    digested, compared = set(_fact(store, "digested", ())), _fact(store, "compared", {})
    kept = set()
    for name, info in checkpoint.tensors.items():
        old = before.checkpoint.tensors.get(name)
        if old is None or name in touched or (old.dtype, old.shape) != (info.dtype, info.shape):
            continue
        if before.checkpoint.origin(old.shard) != checkpoint.origin(info.shard):
            continue
        if linears.get(name) != old_linears.get(name) or (
            name in digested and not before.store.has(DIGESTS, f"tensor:{name}")
        ):
            continue
        kept.add(name)
    compared_before = _fact(before.store, "compared", {})
    kept -= {
        name for name in kept if compared.get(name) != compared_before.get(name) or compared.get(name, name) not in kept
    }
    subjects = [f"tensor:{name}" for name in kept] + [f"linear:{linears[name].name}" for name in kept & linears.keys()]
    store.carry(before.store, subjects)
    new_names = {checkpoint.origin(n): n for n in checkpoint.shards}
    for name in kept & digested:  # digests are kept by file, and a file may have another name now
        found = store.get(DIGESTS, f"tensor:{name}")
        store.put(
            DIGESTS,
            {new_names.get(before.checkpoint.origin(file), file): digest for file, digest in found.items()},
            f"tensor:{name}",
        )
    return kept


def _fact(store: Store, fact: str, default: Any) -> Any:
    return store.value(fact) if store.has_value(fact) else default


def _linears(store: Store) -> dict[str, Linear]:
    spec = cast("ModelSpec | None", _fact(store, "spec", None))
    return {linear.tensor: linear for linear in spec.linears} if spec is not None else {}
