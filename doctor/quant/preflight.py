"""What a run would take, from headers (`plan`), and whether it would end well (`preflight`), before hours of
quantizing.

The preflight quantizes the first and the last decoder layer for real, into a folder that is thrown away, and judges
them by the rules of a run. The last layer gets the outputs of the first one: its true inputs would need every layer
between. So its errors are a hint, while non-finite values, shapes that cannot be packed, and speed are what they will
be.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.lint.rule import Rule
from doctor.model.spec import ModelSpec
from doctor.quant import budget, export
from doctor.quant.budget import Need, gib
from doctor.quant.duration import Step
from doctor.quant.job import Result, clock, try_layers
from doctor.quant.tuning.wanted import Cost

ROWS = 32  # of the calibration rows: enough for a speed, few enough for a minute


@dataclass(frozen=True)
class Forecast:
    """What a whole run takes. Bytes and seconds; problems would end the run.

    blocks: decoder layers. seconds: of the whole run, None where it is not foreseen. steps: of them, where a plan
    foresees each. sampling: bytes that the whole model takes while it writes calibration rows, before the first layer;
    0 where it writes none. tuning: bytes, at most, of tuning scales on tuned_rows rows after the last layer; 0 where
    that is not done. tuning_on_device: (least, most) bytes of a GPU's memory for it. tried: numbers of the layers that
    a preflight quantized.
    """

    blocks: int
    rows: int
    length: int
    need: Need
    memory: int  # what the process may take
    hidden_on_disk: bool
    free_disk: int
    reads_ahead: bool = False
    seconds: float | None = None
    steps: tuple[Step, ...] = ()
    sampling: int = 0
    tuning: int = 0
    tuned_rows: int = 0
    tuning_on_device: tuple[int, int] = (0, 0)
    tried: tuple[int, ...] = ()
    tried_rows: int = 0
    problems: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return max(self.running, self.sampling, self.tuning)

    @property
    def running(self) -> int:
        """Bytes while layers are quantized."""
        on_top = (0 if self.hidden_on_disk else self.need.hidden) + (self.need.ahead if self.reads_ahead else 0)
        return self.need.fixed + on_top

    @property
    def disk(self) -> int:
        return self.need.disk + (self.need.hidden if self.hidden_on_disk else 0)

    def lines(self) -> list[str]:
        """For a screen: one line each for memory with its parts, disk, time and problems."""
        parts = [_("{what} {size}", what=what, size=gib(size)) for what, size in self.need.parts() if size]
        parts.append(
            _("hidden states in a file")
            if self.hidden_on_disk
            else _("hidden states {size}", size=gib(self.need.hidden))
        )
        if self.reads_ahead and self.need.ahead:
            parts.append(_("the next decoder layer, read ahead, {size}", size=gib(self.need.ahead)))
        found: list[str] = [
            _(
                "memory  {peak} at the peak: {parts}; suspended forwards take what is left",
                peak=gib(self.running),
                parts=listed(parts),
            )
        ]
        if self.sampling:
            found.append(
                _(
                    "        {peak} before the first layer, where the whole model writes a part of the "
                    "calibration rows",
                    peak=gib(self.sampling),
                )
            )
        if self.tuning:
            found.append(
                _(
                    "        up to {peak} after the last layer, where scales are tuned on {rows} rows (--tune)",
                    peak=gib(self.tuning),
                    rows=self.tuned_rows,
                )
            )
        small = self.need.on_small_device
        found.append(
            _(
                "GPU     up to {size} of its memory, with --device cuda; {small} where it is smaller: then Hessians "
                "lie in the host's",
                size=gib(self.need.on_device),
                small=gib(small),
            )
            if 0 < small < self.need.on_device
            else _("GPU     up to {size} of its memory, with --device cuda", size=gib(self.need.on_device))
        )
        if self.tuning:
            least, most = map(gib, self.tuning_on_device)
            found.append(
                _(
                    "        up to {most} of it while scales are tuned; {least} where it is smaller: then codes are "
                    "read again in each step",
                    most=most,
                    least=least,
                )
            )
        found.append(
            _(
                "disk    {peak} at the peak, {end} at the end; {free} free",
                peak=gib(self.disk),
                end=gib(self.need.output),
                free=gib(self.free_disk),
            )
        )
        if self.steps:
            named = [_("{what} {clock}", what=step.name, clock=clock(step.seconds)) for step in self.steps]
            found.append(
                _(
                    "time    about {clock}: {steps}",
                    clock=clock(sum(s.seconds for s in self.steps)),
                    steps=listed(named),
                )
            )
        elif self.seconds is not None:
            found.append(
                _(
                    "time    about {clock} for {layers} layers: measured on layer {tried} of {layers} with {few} "
                    "of {rows} rows",
                    clock=clock(self.seconds),
                    layers=self.blocks,
                    tried=listed(str(i + 1) for i in self.tried),
                    few=self.tried_rows,
                    rows=self.rows,
                )
            )
            if len(self.tried) > 1:
                found.append(
                    _(
                        "        layer {last} got the outputs of layer 1, not its own inputs: its errors are a hint",
                        last=self.tried[-1] + 1,
                    )
                )
        return found + [_("would fail: {problem}", problem=problem) for problem in self.problems]

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
    tuning: Cost = Cost(),  # noqa: B008 - it cannot change
) -> Forecast:
    """From headers alone. rows of `length` tokens, for a method that takes any. sampling: bytes of the whole model,
    where it writes rows; tuning: of scales, where that is done.
    """
    rows = rows if recipe.calibrated else 0
    need = budget.needs(checkpoint, spec, recipe, rows, length, memory)
    limit = memory if memory is not None else budget.resident() + budget.free_memory()
    found = Forecast(
        spec.n_layers or 0,
        rows,
        length,
        need,
        limit,
        need.hidden > budget.left(need, memory),
        _free_disk(output),
        budget.reads_ahead(need, memory),
        sampling=sampling,
        tuning=tuning.peak,
        tuned_rows=tuning.rows,
        tuning_on_device=(tuning.least, tuning.most),
    )
    return replace(found, problems=tuple(_problems(found, output, memory)))


def _problems(found: Forecast, output: Path, memory: int | None) -> list[str]:
    """Where memory or disk do not suffice."""
    problems: list[str] = []
    need, limit = gib(found.need.fixed), gib(found.memory)
    if found.need.fixed > found.memory:
        problems.append(
            _("memory: {need} at least, {limit} free", need=need, limit=limit)
            if memory is None
            else _("memory: {need} at least, {limit} allowed", need=need, limit=limit)
        )
    if found.disk > found.free_disk:
        problems.append(
            _(
                "disk: {need} at {place}, {free} free",
                need=gib(found.disk),
                place=str(output.parent),
                free=gib(found.free_disk),
            )
        )
    return problems


def preflight(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    recipe: Recipe,
    output: Path,
    rows: list[list[int]],
    store: Store,
    rules: list[Rule],
    *,
    memory: int | None,
    device: str,
    around: float,
    progress: Callable[[str], None],
) -> tuple[Forecast, Result]:
    """(forecast, what the two layers gave). around: seconds of the work before and after the layers, measured by the
    caller.

    Rules that only warn about a Hessian are left out: with few rows they would warn of the preflight and not of the
    run.
    """
    forecast = plan(checkpoint, spec, recipe, output, len(rows), max(map(len, rows), default=0), memory)
    layers = tuple(dict.fromkeys((0, forecast.blocks - 1)))
    few = rows[:: -(-len(rows) // ROWS)] if rows else []
    judging = [r for r in rules if r.severity == "error" or "hessian" not in r.facts]
    with tempfile.TemporaryDirectory(prefix="doctor-preflight-") as folder:
        staged = export.Output.open(Path(folder) / "out", {})
        started = time.perf_counter()
        result, seconds = try_layers(
            checkpoint,
            spec,
            recipe,
            few,
            staged,
            store,
            judging,
            layers,
            memory=memory,
            progress=progress,
            device=device,
        )
        opening = time.perf_counter() - started - sum(seconds)
    solving = sum(r["seconds"] for r in result.records)
    share = len(rows) / len(few) if few else 1.0
    per_layer = (solving + (sum(seconds) - solving) * share) / max(1, len(seconds))
    forecast = replace(
        forecast,
        seconds=around + opening * share + per_layer * forecast.blocks,
        tried=layers,
        tried_rows=len(few),
        problems=(*forecast.problems, *(f.message for f in result.stopped)),
    )
    return forecast, result


def _free_disk(output: Path) -> int:
    folder = next((p for p in (output, *output.parents) if p.exists()), Path(os.sep))
    return shutil.disk_usage(folder).free
