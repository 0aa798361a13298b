"""Before hours of quantizing: what they would take, from headers (`plan`), and whether they would end well
(`preflight`).

The preflight quantizes the first and the last decoder block for real, into a folder that is thrown away, and judges
them by the rules of a run. The last block gets what leaves the first one: its true inputs would need every block
between. So its numbers are a hint, while non-finite values, shapes that cannot be packed and speed are what they will
be.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.rule import Rule
from doctor.model.spec import ModelSpec
from doctor.quant import budget, export
from doctor.quant.budget import Need
from doctor.quant.job import Result, try_blocks

ROWS = 32  # of the calibration rows: enough for a speed, few enough for a minute


@dataclass
class Forecast:
    """What a whole run takes. Bytes and seconds; seconds is None for a plan, which measures nothing. problems end a
    run.
    """

    blocks: int
    rows: int
    length: int
    need: Need
    memory: int  # what the process may take
    hidden_on_disk: bool
    free_disk: int
    seconds: float | None = None
    # bytes that the whole model takes while it writes calibration rows, before the first block; 0: it writes none
    sampling: int = 0
    tried: tuple[int, ...] = ()
    tried_rows: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.running, self.sampling)

    @property
    def running(self) -> int:
        """Bytes while blocks are quantized."""
        return self.need.fixed + (0 if self.hidden_on_disk else self.need.hidden)

    @property
    def disk(self) -> int:
        return self.need.disk + (self.need.hidden if self.hidden_on_disk else 0)

    def lines(self) -> list[str]:
        """For a screen: one line each for memory with its parts, disk, time and problems."""
        hidden = "hidden states in a file" if self.hidden_on_disk else f"hidden states {_gib(self.need.hidden)}"
        parts = [f"{what} {_gib(size)}" for what, size in self.need.parts() if size]
        before = (
            [
                f"        {_gib(self.sampling)} before the first block, where the whole model writes a part of the calibration rows"
            ]
            if self.sampling
            else []
        )
        found = [
            f"memory  {_gib(self.running)} at the peak: {', '.join([*parts, hidden])}; passes that wait between stages take what is left",
            *before,
            f"GPU     up to {_gib(self.need.on_device)} of its memory, with --device cuda",
            f"disk    {_gib(self.disk)} at the peak, {_gib(self.need.output)} at the end; {_gib(self.free_disk)} free",
        ]
        if self.seconds is not None:
            tried = " and ".join(str(i + 1) for i in self.tried)
            found.append(
                f"time    about {_clock(self.seconds)} for {self.blocks} blocks: measured on block {tried} of {self.blocks} "
                f"with {self.tried_rows} of {self.rows} rows"
            )
            if len(self.tried) > 1:
                found.append(
                    f"        block {self.tried[-1] + 1} got the outputs of block 1, not its own inputs: its errors are a hint"
                )
        return found + [f"would fail: {problem}" for problem in self.problems]

    def as_dict(self) -> dict:
        return {**asdict(self), "peak": self.peak, "disk": self.disk}


def plan(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    output: Path,
    rows: int,
    length: int,
    memory: int | None,
    sampling: int = 0,
) -> Forecast:
    """From headers alone. rows of `length` tokens; rtn takes none. sampling: bytes of the whole model, where it writes
    rows.
    """
    rows = 0 if recipe.method == "rtn" else rows
    need = budget.needs(checkpoint, spec, recipe, rows, length)
    limit = memory if memory is not None else budget.resident() + budget.free_memory()
    found = Forecast(
        spec.n_layers or 0,
        rows,
        length,
        need,
        limit,
        need.hidden > budget.left(need, memory),
        _free_disk(output),
        sampling=sampling,
    )
    if need.fixed > limit:
        found.problems.append(
            f"memory: {_gib(need.fixed)} at least, {_gib(limit)} {'allowed' if memory is not None else 'free'}"
        )
    if found.disk > found.free_disk:
        found.problems.append(f"disk: {_gib(found.disk)} at {output.parent}, {_gib(found.free_disk)} free")
    return found


def preflight(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    output: Path,
    rows: list[list[int]],
    store,
    rules: list[Rule],
    *,
    memory: int | None,
    device: str,
    around: float,
    progress: Callable[[str], None],
) -> tuple[Forecast, Result]:
    """(forecast, what the two blocks gave). around: seconds of the work before and after the blocks, measured by the
    caller.

    Rules that only warn about a Hessian are left out: with few rows they would warn of the preflight and not of the
    run.
    """
    forecast = plan(checkpoint, spec, recipe, output, len(rows), max(map(len, rows), default=0), memory)
    blocks = tuple(dict.fromkeys((0, forecast.blocks - 1)))
    few = rows[:: -(-len(rows) // ROWS)] if rows else []
    judged = [r for r in rules if r.severity == "error" or "hessian" not in r.facts]
    with tempfile.TemporaryDirectory(prefix="doctor-preflight-") as folder:
        staged = export.Output.open(Path(folder) / "out", {})
        started = time.perf_counter()
        result, seconds = try_blocks(
            checkpoint,
            spec,
            recipe,
            few,
            staged,
            store,
            judged,
            blocks,
            memory=memory,
            progress=progress,
            device=device,
        )
        opening = time.perf_counter() - started - sum(seconds)
    solving = sum(r["seconds"] for r in result.records)
    share = len(rows) / len(few) if few else 1.0
    per_block = (solving + (sum(seconds) - solving) * share) / max(1, len(seconds))
    forecast.seconds = around + opening * share + per_block * forecast.blocks
    forecast.tried, forecast.tried_rows = blocks, len(few)
    return forecast, result


def _free_disk(output: Path) -> int:
    folder = next((p for p in (output, *output.parents) if p.exists()), Path(os.sep))
    return shutil.disk_usage(folder).free


def _clock(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
