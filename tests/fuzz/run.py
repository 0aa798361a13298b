"""`make fuzz`: broken headers, JSON files and checkpoints by seed; prints counts, failures, slowest and memory.

python tests/fuzz/run.py [--headers N] [--json N] [--checkpoints N] [--packed N] [--gguf N] [--from SEED]
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("DOCTOR_LOAD_PROOF", "0")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from cases import Fuzz  # noqa: E402 - found by the path above

COUNTS = {  # option -> (kind of case, how many)
    "headers": ("header", 1_000_000),
    "json": ("json", 100_000),
    "checkpoints": ("checkpoint", 10_000),
    "packed": ("packed", 10_000),
    "gguf": ("gguf", 10_000),
}


def run(fuzz: Fuzz, kind: str, seeds: range) -> tuple[int, int]:
    """(cases done, of these failed); fewer than there are seeds where Ctrl-C or SIGTERM ended it."""
    bad = 0
    for number, seed in enumerate(seeds):
        try:
            fuzz.run(kind, seed)
        except KeyboardInterrupt:
            return number, bad
        except Exception as error:
            bad += 1
            if bad <= 10:
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(f"{kind} {seed}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})", flush=True)
    return len(seeds), bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name, (_kind, count) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--from", dest="first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    counts = {kind: getattr(options, name) for name, (kind, _count) in COUNTS.items()}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="doctor-fuzz-") as folder:
        fuzz = Fuzz(Path(folder))
        for kind, count in counts.items():
            done, bad = run(fuzz, kind, range(options.first, options.first + count))
            seconds, seed = fuzz.slowest.get(kind, (0.0, -1))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{kind}: {done:,} of {count:,} cases, {bad} failed, slowest {seconds:.2f} s (seed {seed}), peak "
                f"{peak:.0f} MiB",
                flush=True,
            )
            failed += bad
            if done < count:
                break
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
