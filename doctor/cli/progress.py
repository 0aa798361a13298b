"""How far a run is: bars where a person watches, and what --progress asks for elsewhere (doctor/cli/stderr.py)."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from doctor.cli import stderr
from doctor.core.messages import Message, _, plural
from doctor.locale import catalogue

SHORT = 64 << 20  # bytes: less than this is done before a bar is of use
UNITS = {"reply": "tokens", "score": "rows", "tune": "steps", "tasks": "layers"}  # of a step, layers elsewhere
APART = {"json": 0.5, "lines": 10.0}  # seconds between two lines of a step whose end is not reached

Bytes = Callable[[str, int], None]
Steps = Callable[[str, int, int], None]
Say = Callable[[str], None]


class Teller:
    """Writes how far each step is: with --progress json an object, with lines a sentence, at most every so often."""

    def __init__(self, mode: str):
        self._mode = mode
        self._clock = time.monotonic()  # when the last thing was told: a step begins where the one before it ended
        self._began: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._lock = threading.Lock()

    def passed(self) -> None:
        """Something that counts nothing was said."""
        self._clock = time.monotonic()

    def tell(self, step: str, done: int, total: int, unit: str) -> None:
        """That so many of a step's units are done."""
        now = time.monotonic()
        with self._lock:
            # Layers are told when they are done, the first chunk of many bytes as it comes: what was before it is no
            # measure of the rest.
            began = self._began.setdefault(step, now if unit == "bytes" else self._clock)
            told = self._told.get(step, float("-inf"))
            self._clock = now
            if done < total and now - told < APART[self._mode]:
                return
            self._told[step] = now
        seconds = now - began
        left = seconds * (total - done) / done if done and (seconds or done >= total) else None
        if self._mode == "json":
            left = None if left is None else round(left, 3)
            values = {"done": done, "total": total, "unit": unit, "seconds": round(seconds, 3), "left": left}
            return stderr.write_json(step=step, **values)
        said = {"step": _(step), "done": done, "total": total}
        if left:
            stderr.line(_("{step}: {done:,} of {total:,}, about {left:.0f} s left", **said, left=left))
        else:
            stderr.line(_("{step}: {done:,} of {total:,} in {seconds:.1f} s", **said, seconds=seconds))


def _counted(**options: Any) -> Any:
    """rich's Progress on stderr, whose tasks are counted one by one; options: more of its own."""
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
def layer_bars() -> Iterator[Steps]:
    """A bar for each phase of a run through a model's decoder layers, rows or tokens.

    Gives the function to call with a phase, how many are done and how many there are.
    """
    mode = stderr.mode()
    if mode in ("json", "lines"):
        teller = Teller(mode)
        yield lambda phase, done, total: teller.tell(phase, done, total, UNITS.get(phase, "layers"))
        return
    if mode != "bar":
        yield lambda phase, done, total: None
        return
    tasks: dict[str, Any] = {}
    with _counted() as bar:

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(catalogue.say(phase))
            bar.update(tasks[phase], completed=done, total=total)

        yield tick


@contextmanager
def run_lines(say: Say) -> Iterator[Say]:
    """The lines of a run that computes for long: `say` for each, but a bar or an object for what counts something.

    Gives the function to call with each line. A layer's line is shown beside a bar for what it names: damping that was
    raised.
    """
    mode = stderr.mode()
    if mode == "bar":
        with _counted(redirect_stderr=True) as bar:
            yield _BarOfLines(bar, say)
        return
    teller = Teller(mode) if mode in APART else None

    def show(text: str) -> None:
        step = counted_in(text)
        if teller is not None and step is not None and (mode == "json" or not _is_line(text)):
            teller.tell(*step)
        elif mode != "off" and _is_line(text):
            say(text)
            if teller is not None:
                teller.passed()

    yield show


class _BarOfLines:
    """Turns what counts something into bars, and passes on the other lines."""

    def __init__(self, bar: Any, say: Say):
        self._bar, self._say = bar, say
        self._tasks: dict[str, Any] = {}
        self._linears = 0

    def __call__(self, text: str) -> None:
        step = counted_in(text)
        if step is None:
            return self._say(text)
        name, done, total, _unit = step
        self._linears += _found(text, "n") or 0
        named = catalogue.say(name)
        if name == "quantize":
            named = catalogue.translated(plural("quantize: {n:,} linear", "quantize: {n:,} linears", self._linears))
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(named, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total, description=named)
        if isinstance(text, Message) and "names" in text.values:
            self._say(text)


def counted_in(text: str) -> tuple[str, int, int, str] | None:
    """(step, done, total, unit) of a line that says how far a run is; None of another line."""
    for names, step, unit in ((("i", "count", "n"), "quantize", "layers"), (("step", "steps", "kl"), "tune", "steps")):
        values = [_found(text, name) for name in names]
        if None not in values:
            return step, int(values[0] or 0), int(values[1] or 0), unit
    if isinstance(text, Message) and {"phase", "done", "total"} <= text.values.keys():
        phase = text.values["phase"]
        return phase, text.values["done"], text.values["total"], UNITS.get(phase, "layers")
    return None


def _is_line(text: str) -> bool:
    """Whether it is a line of a log: how far a phase is changes too often for that."""
    return not (isinstance(text, Message) and "phase" in text.values)


def _found(text: str, name: str) -> Any:
    """A value in a line, or in the line that it goes on from; None where there is none."""
    line: Any = text
    while isinstance(line, Message):
        if name in line.values and not isinstance(line.values[name], Message):
            return line.values[name]
        line = line.values.get("done")
    return None


@contextmanager
def byte_bars(total: int, *phases: str) -> Iterator[Bytes]:
    """A bar in bytes for each phase of a run through a checkpoint of `total` bytes.

    Gives the function to call with a phase and the size of each chunk of it, from any thread.
    """
    mode = stderr.mode()
    if mode in APART:
        counts, lock, teller = dict.fromkeys(phases, 0), threading.Lock(), Teller(mode)

        def add(phase: str, n: int) -> None:
            if phase not in counts:
                return
            with lock:
                counts[phase] += n
            teller.tell(phase, counts[phase], max(total, counts[phase]), "bytes")

        yield add
        for phase, count in counts.items():
            if 0 < count < total:  # what is linked, or lies in no shard, is not read
                teller.tell(phase, count, count, "bytes")
        return
    if mode != "bar" or total < SHORT:
        yield lambda phase, n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(None),
        *map(_of_a_total, (DownloadColumn, TransferSpeedColumn, TimeRemainingColumn)),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        tasks = {phase: bar.add_task(catalogue.say(phase), total=total, visible=False) for phase in phases}
        judging: list[Any] = []  # what follows the last phase has no length that is known

        def tick(phase: str, n: int) -> None:
            if phase not in tasks:
                return
            bar.update(tasks[phase], advance=n, visible=True)
            if phase == phases[-1] and not judging and bar.tasks[tasks[phase]].finished:
                judging.append(bar.add_task(catalogue.say("judging"), total=None))

        yield tick


def _of_a_total(column: Any) -> Any:
    """A column of rich's that is empty beside a task without a total."""
    from rich.text import Text

    class Column(column):
        def render(self, task: Any) -> Any:
            return super().render(task) if task.total is not None else Text()

    return Column()
