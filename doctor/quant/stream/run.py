"""The run: divisors first, then every tensor of every shard, as many at once as there are cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial

import torch

from doctor.core.messages import plural
from doctor.core.recipe import Recipe
from doctor.core.records import SLOWER_PATHS, SolveRecord
from doctor.core.store import Store
from doctor.lint.engine import judge
from doctor.lint.rule import Rule
from doctor.plan.groups import together
from doctor.quant import budget, export
from doctor.quant.job import Result
from doctor.quant.records import Record, put_facts, record
from doctor.quant.setup import RUN_STAGES
from doctor.quant.solve.cpu import note
from doctor.quant.solve.float_scale import divisor_of
from doctor.quant.solve.losses import share_of
from doctor.quant.stage import sha256_of
from doctor.quant.stream.choose import Chosen
from doctor.quant.stream.rounding import Rounding
from doctor.quant.stream.shards import OutputShard, absmax
from doctor.scan.value_facts import ABSMAX


def run(
    chosen: Chosen,
    recipe: Recipe,
    output: export.Output,
    store: Store,
    rules: Iterable[Rule],
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Round what was chosen into parts of `output`, one for each shard; a part that is there is not written again.

    Raises NotQuantizable for values that no scale can hold, MachineError.
    """
    store.put(SLOWER_PATHS, (note("cpu"),) if note("cpu") else ())
    records: list[Record] = []
    pending = []
    done_before = {entry["shard"]: entry["records"] for entry in output.notes() if "shard" in entry}
    for number, shard in enumerate(chosen.shards, 1):
        name = f"{number:05d}"
        if output.has_part(name) and shard in done_before:
            records += done_before[shard]
        else:
            pending.append((shard, name))
    threads, workers = torch.get_num_threads(), min(budget.STREAM_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        roundings = _roundings(chosen, recipe, store, pool, [shard for shard, _name in pending])
        sealing: Callable[[], None] = _nothing
        try:
            for shard, name in pending:
                started = time.perf_counter()
                out = OutputShard(output.part(name), chosen.shards[shard], chosen, roundings)
                made = _write(chosen, out, pool, recipe)
                records += made
                sealing()
                digest = pool.submit(sha256_of, output.part(name))  # while the next one is written
                sealing = partial(_seal, output, name, shard, made, digest)
                progress(_said(made, chosen.shards[shard], shard, time.perf_counter() - started))
        finally:
            sealing()
    torch.set_num_threads(threads)  # which the workers' own setting may have changed
    for found in records:
        solved = SolveRecord(**{**found["solve"], "attempts": ()})
        put_facts(store, found["name"], solved, None)
    for found in chosen.kept:
        put_facts(store, found["name"], SolveRecord(**{**found["solve"], "attempts": ()}), None)
    findings, _runs = judge(store, [rule for rule in rules if rule.cost in RUN_STAGES])
    stopped = tuple(f for f in findings if f.severity == "error")
    in_order = sorted(records, key=lambda r: (r["block"] is None, r["block"] or 0, r["name"]))
    return Result(recipe, (*in_order, *chosen.kept), stopped, tuple(findings))


def _nothing() -> None:
    """No shard waits to be named in the journal."""


def _seal(output: export.Output, name: str, shard: str, made: list[Record], digest: Future[str]) -> None:
    """Name a finished part in the journal, with the hash of its bytes and what went into it."""
    output.note({"part": name, "sha256": digest.result()})
    output.note({"shard": shard, "records": made})


def _roundings(
    chosen: Chosen, recipe: Recipe, store: Store, pool: ThreadPoolExecutor, shards: list[str]
) -> dict[str, Rounding]:
    """How each tensor is rounded; linears that an engine joins share the divisor of their scales."""
    own = {tensor: Rounding.of(recipe.for_linear(x.name)) for tensor, x in chosen.rounded.items()}
    divided = {tensor: x for tensor, x in chosen.rounded.items() if own[tensor].kind.divided}
    if not divided or not shards:
        return own
    infos = chosen.view.tensors

    def most(tensor: str) -> float:
        known = store.find(ABSMAX, f"tensor:{tensor}")
        return known if known is not None else absmax(chosen.view, infos[tensor], divided[tensor])

    linears = list(divided.values())
    found = dict(zip((x.name for x in linears), pool.map(most, divided), strict=True))
    joined: dict[str, float] = {}
    by_layer: dict[tuple, list] = {}
    for x in linears:
        by_layer.setdefault((x.block, x.name.rpartition(".")[0]), []).append(x)
    for group in by_layer.values():
        for x in group:
            joined[x.name] = divisor_of(max(found[name] for name in together(group, [x.name])))
    return own | {tensor: replace(own[tensor], divisor=joined[x.name]) for tensor, x in divided.items()}


def _write(chosen: Chosen, out: OutputShard, pool: ThreadPoolExecutor, recipe: Recipe) -> list[Record]:
    """One shard, whole. Returns the records of its linears."""
    out.open()
    try:
        largest_first = sorted(out.infos, key=lambda info: -info.nbytes)
        tasks = [pool.submit(out.write, info) for info in largest_first]
        _finish(tasks)
        out.finish()
    finally:
        out.close()
    linears = [chosen.rounded[info.name] for info in out.infos if info.name in chosen.rounded]
    made = []
    for linear in linears:
        sums = out.sums[linear.name]
        loss = share_of(torch.tensor(sums.lost, dtype=torch.float64), torch.tensor(sums.whole, dtype=torch.float64))
        solved = SolveRecord("rtn", recipe.damp, 0.0, "", loss, loss, (), "")
        made.append(record(linear, solved, None, 0.0))
    return made


def _finish(tasks: list[Future]) -> None:
    """Wait for all; the first error ends the others that have not begun."""
    waiting = set(tasks)
    try:
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for task in done:
                task.result()
    except BaseException:
        for task in waiting:
            task.cancel()
        wait(tasks)
        raise


def _said(made: list[Record], infos: tuple, shard: str, seconds: float) -> str:
    size = sum(info.nbytes for info in infos)
    return plural(
        "{shard}: {n} linear rounded, {size:.2f} GB in {seconds:.1f} s",
        "{shard}: {n} linears rounded, {size:.2f} GB in {seconds:.1f} s",
        len(made),
        shard=shard,
        size=size / 1e9,
        seconds=seconds,
    )
