"""`make faults`: every command is killed, or its disk fills, at every file call; what is left must be whole, and the
next run must end.

    python tests/fuzz/faults.py [--first N] [--most N] [--kills N] [--races N] [--seed N] [--command NAME]

For each command the n-th call of the operating system that touches a file ends the process (SIGKILL) or fails with
ENOSPC, for every n until the command ends before it. Then: the source is as it was; the output is absent or whole; the
same command, or its resume, ends with the same bytes as an undisturbed run. A run in between may end at a random moment
instead (--kills), and pairs of runs into one output are started together (--races): one of them must write it whole and
the other must be refused. Each trial is a fork of one process that has done the same command before, on files in
memory where the machine has such a place: imports, tables and rules are paid for once, and no disk is waited for.
"""

import argparse
import builtins
import errno
import io
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.update(DOCTOR_LOAD_PROOF="0", OMP_NUM_THREADS="1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from doctor import api  # noqa: E402 - found by the path above
from doctor.core.errors import DoctorError, MachineError, PlanRefused  # noqa: E402
from doctor.core.recipe import Recipe  # noqa: E402
from doctor.fixing.filesystem import sha256  # noqa: E402
from doctor.fixing.in_place import after_name, kept_name  # noqa: E402
from doctor.lint.testing import tiny  # noqa: E402
from doctor.quant.stage import stage_of  # noqa: E402

WRITES = ("open", "write", "pwrite", "fsync", "mkdir", "link", "ftruncate", "truncate", "posix_fallocate", "sendfile",
          "copy_file_range")  # fmt: skip
CALLS = (*WRITES, "rename", "replace", "unlink", "rmdir")
RECIPE = Recipe(group_size=32, method="rtn")
STREAMED = Recipe(method="rtn", bits=8, group_size=-1, format="float-quantized", activations="fp8")
MEMORY_FILES = Path("/dev/shm")
DONE, NOT_REACHED, REFUSED, FULL, BROKEN = 0, 2, 3, 4, 5
State = dict[str, str]


class Command:
    """One command on a directory `work`. prepare makes its input; run is what is disturbed; finish what a user does
    next; result the files that it is about.
    """

    def __init__(self, name: str, prepare: Callable, run: Callable, finish: Callable, result: Callable):
        self.name, self.prepare, self.run, self.finish, self.result = name, prepare, run, finish, result


def spoilt(work: Path) -> None:
    case = tiny()
    case.shards = 2
    case.json["generation_config.json"]["eos_token_id"] = 0
    case.write(work / "model")


def fix(work: Path) -> None:
    api.fix(work / "model", work / "out", tiny().recipe)


def fix_in_place(work: Path) -> None:
    api.recover(work / "model")
    api.fix(work / "model", None, tiny().recipe, in_place=True)


def fixed_in_place(work: Path) -> None:
    spoilt(work)
    fix_in_place(work)


def undo(work: Path) -> None:
    api.undo(work / "model")


def quantize(work: Path, resume: bool = False, recipe: Recipe = RECIPE) -> None:
    result = api.quantize(work / "model", work / "out", recipe, resume=resume)
    if result.output is None:  # what could not be read is a finding
        raise MachineError("; ".join(f.message for f in result.report.findings))


def whole(work: Path) -> None:
    case = tiny()
    case.shards = 2
    case.write(work / "model")


def half_quantized(work: Path) -> None:
    """A run that was killed after its first layer."""
    whole(work)
    wait(fork(lambda: quantize(work), AtCall(("rename",), 3, kill)))


def ensure_fixed(work: Path) -> None:
    api.recover(work / "model")
    if not kept_name(work / "model").exists():
        fix_in_place(work)


def ensure_undone(work: Path) -> None:
    api.recover(work / "model")
    if kept_name(work / "model").exists():
        undo(work)
    shutil.rmtree(after_name(work / "model"), ignore_errors=True)


def ensure(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def finish(work: Path) -> None:
        if not (work / name).exists():
            make(work)

    return finish


COMMANDS = (
    Command("fix", spoilt, fix, ensure("out", fix), lambda work: files(work / "out")),
    Command("fix --in-place", spoilt, fix_in_place, ensure_fixed, lambda work: files(work / "model")),
    Command("undo", fixed_in_place, undo, ensure_undone, lambda work: files(work / "model")),
    Command(
        "quantize", whole, quantize, ensure("out", partial(quantize, resume=True)), lambda work: files(work / "out")
    ),
    Command(
        "quantize --resume",
        half_quantized,
        partial(quantize, resume=True),
        ensure("out", partial(quantize, resume=True)),
        lambda work: files(work / "out"),
    ),
    Command(  # rounded shard by shard as it is read, which has a writer of its own
        "quantize fp8",
        whole,
        partial(quantize, recipe=STREAMED),
        ensure("out", partial(quantize, resume=True, recipe=STREAMED)),
        lambda work: files(work / "out"),
    ),
)


def files(folder: Path) -> State:
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != "doctor.json"} if folder.exists() else {}


def kill(_name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(_name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class CountedFile(io.FileIO):
    """A file whose writes are counted: those of Python's own file objects go through no function of `os`."""

    def __init__(self, name, mode: str, count: Callable[[], None], **more):
        super().__init__(name, mode, **more)
        self._count = count

    def write(self, data) -> int:
        self._count()
        return super().write(data)


class AtCall:
    """Makes the n-th of these calls of the operating system do `what` first, in the process that calls `arm`.

    A disk is not full for a reader: with `what` = full, a file that is opened to be read is no call. The call is told
    in memory that parent and child share, so that it is known after a kill too.
    """

    def __init__(self, names: tuple[str, ...], n: int, what: Callable[[str], None]):
        self.names, self.n, self.what, self.count = names, n, what, 0
        self.told = mmap.mmap(-1, 400)

    def arm(self) -> None:
        for name in self.names:
            setattr(os, name, self._counted(getattr(os, name), name))
        if "open" in self.names:  # pathlib's and Python's own, which do not go through os.open
            builtins.open = io.open = self._opener(io.open)

    def _counted(self, real: Callable, name: str) -> Callable:
        def call(*args, **more):
            if self.what is not full or name != "open" or _writes(args, more):
                self._met(name, args[0])
            return real(*args, **more)

        return call

    def _opener(self, real: Callable) -> Callable:
        def call(file, mode: str = "r", *args, **more):
            if not set(mode) & set("wax+"):
                if self.what is not full:
                    self._met("open", file)
                return real(file, mode, *args, **more)
            if not isinstance(file, int):
                self._met("open", file)
            raw = CountedFile(file, mode.replace("b", "").replace("t", ""), partial(self._met, "write", file))
            held = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return held if "b" in mode else io.TextIOWrapper(held, encoding=more.get("encoding") or "utf-8")

        return call

    def _met(self, name: str, subject: object) -> None:
        self.count += 1
        if self.count == self.n:
            text = subject.decode("utf-8", "replace") if isinstance(subject, bytes) else str(subject)
            told = f"{name}({text[:200]!r})".encode("utf-8", "replace")[:400]
            self.told[: len(told)] = told
            self.what(name)

    @property
    def call(self) -> str:
        """The call that was disturbed: its name and first argument; "" where it was not reached."""
        return bytes(self.told).rstrip(b"\0").decode("utf-8", "replace")

    @property
    def reached(self) -> bool:
        return self.count >= self.n


def _writes(args: tuple, more: dict) -> bool:
    """Whether a call of the operating system's open may write."""
    flags = args[1] if len(args) > 1 else more.get("flags", 0)
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def fork(work: Callable[[], None], fault: AtCall | None = None) -> int:
    """A process that does the work. It ends with DONE, REFUSED, FULL or BROKEN, or with NOT_REACHED where it was done
    before the fault.
    """
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        if fault:
            fault.arm()
        work()
        code = DONE if fault is None or fault.reached else NOT_REACHED
    except PlanRefused:
        code = REFUSED
    except DoctorError:
        code = FULL
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trials:
    """Trials of one command against an undisturbed run."""

    def __init__(self, command: Command, folder: Path):
        self.command, self.work, self.prepared = command, folder / "work", folder / "prepared"
        for path in (self.prepared, self.work):
            shutil.rmtree(path, ignore_errors=True)
        self.work.mkdir()
        command.prepare(self.work)
        os.rename(self.work, self.prepared)
        self.bad: list[str] = []
        work = self.fresh()
        self.source = files(work / "model")
        command.run(work)  # in this process, so that its forks find everything imported and read
        command.finish(work)
        self.want = command.result(work)
        code = wait(fork(partial(command.run, self.fresh())))
        assert code == DONE and command.result(work) == self.want, f"{command.name}: ended with {code}"

    def fault(self, text: str) -> None:
        """Count a fault, and print it now."""
        self.bad.append(text)
        print(f"FAULT {self.command.name}: {text}", flush=True)

    def fresh(self) -> Path:
        """The directory as `prepare` made it, under the same name."""
        shutil.rmtree(self.work, ignore_errors=True)
        return Path(shutil.copytree(self.prepared, self.work, symlinks=True))

    def judge(self, work: Path, label: str) -> None:
        """What a disturbed run left, and what the next one makes of it."""
        writes_beside = self.command.result(work) if (work / "out").exists() else self.want
        if writes_beside != self.want:
            self.fault(f"{label}: the output is there and not whole")
        if (work / "model").exists() and files(work / "model") not in (self.source, self.want):
            self.fault(f"{label}: the source changed")
        code = wait(fork(lambda: self.command.finish(work)))
        if code != DONE or self.command.result(work) != self.want:
            self.fault(f"{label}: the next run ended with {code}, not with the same bytes")
        left = [n for n in os.listdir(work) if ".doctor-" in n and not n.endswith(".doctor-lock")]
        if left:
            self.fault(f"{label}: {left} is left")

    def every_call(self, calls: tuple[str, ...], what: Callable[[str], None], most: int, first: int = 1) -> int:
        for n in range(first, most + 1):
            work, at = self.fresh(), AtCall(calls, n, what)
            code = wait(fork(partial(self.command.run, work), at))
            if code == NOT_REACHED:
                return n - first
            label = f"{what.__name__} at call {n}, {at.call}"
            if what is full and code not in (FULL, DONE, REFUSED):
                self.fault(f"{label}: ended with {code}, not with an error of ours")
            self.judge(work, label)
        return max(0, most + 1 - first)

    def random_kills(self, count: int, draw: random.Random) -> int:
        whole = min(self._seconds() for _ in range(3))
        killed = tried = 0
        while killed < count and tried < 10 * count:  # some moments lie after the end, of a short command most
            work, tried = self.fresh(), tried + 1
            pid = fork(partial(self.command.run, work))
            time.sleep(draw.uniform(0, whole))
            os.kill(pid, signal.SIGKILL)
            killed += wait(pid) < 0
            self.judge(work, f"kill {tried}")
        return killed

    def _seconds(self) -> float:
        """How long an undisturbed run takes."""
        work = self.fresh()
        started = time.perf_counter()
        wait(fork(lambda: self.command.run(work)))
        return time.perf_counter() - started


def races(folder: Path, command: Command, count: int) -> tuple[int, list[str]]:
    """Two runs into one output, started together. (how often one was refused, what went wrong)."""
    trials, refused = Trials(command, folder), 0
    for n in range(count):
        work = trials.fresh()
        codes = sorted(map(wait, [fork(lambda work=work: command.run(work)) for _ in range(2)]))
        refused += codes == [DONE, REFUSED]
        if codes != [DONE, REFUSED] or command.result(work) != trials.want:
            trials.fault(f"race {n}: ended with {codes}")
        if stage_of(work / "out").exists():
            trials.fault(f"race {n}: a stage is left")
    return refused, trials.bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--first", type=int, default=1, help="the first call of a command that is disturbed")
    parser.add_argument("--most", type=int, default=100_000, help="the last one, at most")
    parser.add_argument("--command", action="append", choices=[c.name for c in COMMANDS], help="this one; repeatable")
    parser.add_argument("--kills", type=int, default=200, help="random kills of each command")
    parser.add_argument("--seed", type=int, default=7, help="of the moments of the random kills")
    parser.add_argument("--races", type=int, default=200, help="pairs of runs into one output, of fix and of quantize")
    options = parser.parse_args()
    import transformers.models.llama.modeling_llama  # noqa: F401 - paid for once

    import doctor.quant.quantize  # noqa: F401

    bad = []
    folder = MEMORY_FILES if MEMORY_FILES.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="doctor-faults-", dir=folder) as place:
        for command in (c for c in COMMANDS if not options.command or c.name in options.command):
            trials = Trials(command, Path(place))
            for what, count in (
                ("killed at {} file calls", lambda t=trials: t.every_call(CALLS, kill, options.most, options.first)),
                ("disk full at {} writes", lambda t=trials: t.every_call(WRITES, full, options.most, options.first)),
                ("{} random kills", lambda t=trials: t.random_kills(options.kills, random.Random(options.seed))),
            ):
                print(f"{command.name}: {what.format(count())}, {len(trials.bad)} faults so far", flush=True)
            bad += [f"{command.name}: {text}" for text in trials.bad]
        for command in (COMMANDS[0], COMMANDS[3]) if options.races else ():
            refused, wrong = races(Path(place), command, options.races)
            print(f"{command.name}: {options.races} races, {refused} refused one of the two, {len(wrong)} faults")
            bad += [f"{command.name}: {text}" for text in wrong]
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
