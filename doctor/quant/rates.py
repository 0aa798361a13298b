"""How fast this machine multiplies, solves, reads and writes, measured in about two seconds: what a forecast of time
divides by.

Matrices are as wide as the model's, up to WIDEST: wider ones are no slower a product. What else the machine does while
this is measured counts as its speed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.model.linears import Linear
from doctor.model.spec import ModelSpec
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.linear import solve_linear
from doctor.quant.solve.hessian import Hessian
from doctor.quant.tuning.wanted import SOLVING

WIDEST = 1024
TOKENS = 1024  # of a product, as a batch of calibration rows has
STREAMED = 8 << 20  # weights that no cache holds, as a step of sampling reads them
SECONDS = 0.3  # for each rate
PROBE_BYTES = 32 << 20


@dataclass(frozen=True)
class Rates:
    """A second's worth on one device. wide, narrow: products of a token and a weight, of many tokens at a time and of
    few (0 where none are sampled). solving: products that solving a linear is counted as (tuning/wanted.py), 0 for a
    recipe without calibration. reading, writing: bytes, 0 where it could not be measured.
    """

    wide: float
    narrow: float
    solving: float
    reading: float
    writing: float


def measured(
    checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, output: Path, few: int, device: str = "cpu"
) -> Rates:
    """Of this machine, for this model. few: tokens of a step of sampling, 0 for none. Nothing is left where `output`
    will lie.
    """
    k, n = min(spec.hidden or WIDEST, WIDEST), min(spec.intermediate or WIDEST, WIDEST)
    weight = torch.randn(n, k, device=device)
    large = torch.randn(STREAMED // k, k, device=device) if few else weight
    wide, narrow = torch.randn(TOKENS, k, device=device), torch.randn(max(few, 1), k, device=device)
    return Rates(
        _rate(wide.numel() * n, lambda: torch.nn.functional.linear(wide, weight), device),
        _rate(narrow.numel() * len(large), lambda: torch.nn.functional.linear(narrow, large), device) if few else 0.0,
        _solving(k, recipe, device) if recipe.solver.factors else 0.0,
        _reading(checkpoint),
        _writing(output),
    )


def _rate(work: float, run: Callable[[], object], device: str) -> float:
    """Work a second of something that is run again and again; the first time warms up."""

    def done() -> None:
        run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    done()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        done()
        times += 1
    return times * work / (time.perf_counter() - started)


def _solving(k: int, recipe: Recipe, device: str) -> float:
    """Of one linear [k, k] by the recipe's own code, its Hessian's factor included."""
    module = torch.nn.Linear(k, k, bias=False, device=device)
    linear = Linear("probe", "probe.weight", "down", 0, k, k)
    own = recipe.with_field("group_size", -1) if k % max(1, recipe.group_size) else recipe
    X = torch.randn(2 * k, k, device=device)

    def solve() -> None:
        hessian = Hessian(k, device=device)
        hessian.add(X)
        solve_linear(linear, module, LayerInput(hessian, own), own)

    return _rate(SOLVING * float(k) ** 3, solve, device)


def _reading(checkpoint: Checkpoint) -> float:
    """Bytes a second of the largest shard that lies on this machine."""
    paths = [Path(checkpoint.root) / name for name in checkpoint.shards]
    with suppress(OSError):
        path = max(paths, key=os.path.getsize)
        started, read = time.perf_counter(), 0
        with open(path, "rb", buffering=0) as file:
            while time.perf_counter() - started < SECONDS and (part := file.read(PROBE_BYTES)):
                read += len(part)
        return read / (time.perf_counter() - started)
    return 0.0


def _writing(output: Path) -> float:
    """Bytes a second into the file system of the output, synced, through a file without a name."""
    folder = next((p for p in output.parents if p.is_dir()), Path(os.sep))
    with suppress(OSError, DoctorError), tempfile.TemporaryFile(dir=folder) as file:
        part = os.urandom(1 << 20) * (PROBE_BYTES >> 20)
        started = time.perf_counter()
        file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return len(part) / (time.perf_counter() - started)
    return 0.0
