"""Bars on stderr where a person watches; elsewhere nothing."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from doctor.core.messages import Message, plural
from doctor.locale import catalogue

SHORT = 64 << 20  # bytes: less than this is done before a bar is of use


def _watched() -> bool:
    return sys.stderr.isatty() and not (
        os.environ.get("CI") or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") or os.environ.get("TERM") == "dumb"
    )


def _layers_counted(**options: Any) -> Any:
    """rich's Progress on stderr, whose tasks are counted in layers; options: more of its own."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        **options,
    )


@contextmanager
def layer_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase of a run through a model's decoder layers.

    Gives the function to call with a phase, the layers done and the layers in all.
    """
    if not _watched():
        yield lambda phase, done, total: None
        return
    tasks: dict[str, Any] = {}
    with _layers_counted() as bar:

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(catalogue.say(phase))
            bar.update(tasks[phase], completed=done, total=total)

        yield tick


@contextmanager
def run_lines(say: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """A bar of the layers of a quantizer's run, under the lines of its other steps; `say` for every line elsewhere.

    Gives the function to call with each line. A layer's line is shown for what it names: damping that was raised.
    """
    if not _watched():
        yield say
        return
    linears = 0
    task: Any = None
    with _layers_counted(redirect_stderr=True) as bar:

        def show(text: str) -> None:
            nonlocal linears, task
            layer = _layer(text)
            if layer is None:
                say(text)
                return
            linears += layer["n"]
            named = catalogue.translated(plural("quantize: {n:,} linear", "quantize: {n:,} linears", linears))
            if task is None:
                task = bar.add_task(named, total=layer["count"])
            bar.update(task, completed=layer["i"], description=named)
            if isinstance(text, Message) and "names" in text.values:
                say(text)

        yield show


def _layer(text: str) -> dict[str, int] | None:
    """The numbers in a line about a finished layer: i of count, n linears; None of another line."""
    line: Any = text
    while isinstance(line, Message) and isinstance(line.values.get("done"), Message):
        line = line.values["done"]
    known = isinstance(line, Message) and {"i", "count", "n"} <= line.values.keys()
    return {key: int(line.values[key]) for key in ("i", "count", "n")} if known else None


@contextmanager
def byte_bars(total: int, *phases: str) -> Iterator[Callable[[str, int], None]]:
    """A bar in bytes for each phase of a run through a checkpoint of `total` bytes.

    Gives the function to call with a phase and the size of each chunk of it, from any thread.
    """
    if not _watched() or total < SHORT:
        yield lambda phase, n: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks = {phase: bar.add_task(phase, total=total, visible=False) for phase in phases}

        def tick(phase: str, n: int) -> None:
            if phase in tasks:
                bar.update(tasks[phase], advance=n, visible=True)

        yield tick
