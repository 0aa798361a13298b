"""The keyword options of doctor.api's jobs, as types: what an editor offers and mypy checks, without importing a job.

Each job's own docstring says what they mean; tests/test_api_types.py holds them to the jobs' parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

FilePath = str | os.PathLike[str]


class Module(Protocol):
    """A torch.nn.Module, a model of transformers among them."""

    def state_dict(self) -> Mapping[str, Any]:
        """name -> tensor of every parameter and buffer."""


InMemory = Module | Mapping[str, Any]  # or tensors by name, of torch or NumPy


class QuantizeOptions(TypedDict, total=False):
    """Of doctor.quant.quantize.quantize."""

    calibration: FilePath | None
    rows: int
    max_seq_length: int
    seed: int | None
    fix: bool
    unsafe_fixes: bool | Iterable[str]
    keep: Iterable[str]
    memory: int | None
    resume: bool
    overwrite: bool
    device: str
    select: Iterable[str]
    ignore: Iterable[str]
    fail_on: str
    rules_dirs: Iterable[Path]
    progress: Callable[[str], None]
    preflight: bool
    prove: Callable[..., Any] | None
    client: Any
    imatrix: FilePath | None
    budget: Any
    diverge: Callable[..., Any] | None
    tune: str | int
    retry_failed: bool
    compare: Callable[..., Any] | None


class PlanOptions(TypedDict, total=False):
    """Of doctor.quant.quantize.plan."""

    rows: int
    max_seq_length: int
    memory: int | None
    calibration: FilePath | None
    budget: Any
    tune: str | int
    device: str
    compare_rows: int
    fixed: bool


class ConvertOptions(TypedDict, total=False):
    """Of doctor.quant.convert.convert."""

    client: Any
    carry: Any
    overwrite: bool
    rules_dirs: Iterable[Path]
    progress: Callable[[str, int], None]


class TuneOptions(TypedDict, total=False):
    """Of doctor.quant.tuning.tune.tune."""

    calibration: FilePath | None
    rows: int
    max_seq_length: int
    passes: int | None
    seed: int
    memory: int | None
    device: str
    overwrite: bool
    client: Any
    rules_dirs: Iterable[Path]
    say: Callable[[str], None]
    progress: Callable[[str, int], None]


class VerifyOptions(TypedDict, total=False):
    """Of doctor.evaluate.verify.verify."""

    text: FilePath | None
    context: int
    rows: int
    memory: int | None
    device: str
    fail_on: str
    progress: Callable[[str, int, int], None]
    load_proof: bool
    client: str | None
    client_python: FilePath | None
    tasks: Sequence[str]


class CompareOptions(TypedDict, total=False):
    """Of doctor.evaluate.ranking.rank."""

    text: FilePath | None
    context: int
    rows: int
    device: str
    progress: Callable[[str, int, int], None]


class KvcacheOptions(TypedDict, total=False):
    """Of doctor.evaluate.kvcache.study.kvcache."""

    context: int
    batch: int
    memory: int | None
    key_bits: int | None
    value_bits: int | None
    measure: bool
    text: FilePath | None
    rows: int
    measured_context: int
    device: str
    progress: Callable[[str, int, int], None]
    say: Callable[[str], None]


class AdviseOptions(TypedDict, total=False):
    """Of doctor.evaluate.advise.advise.advise."""

    memory: int | None
    gpus: int
    context: int | None
    batch: int
    gpu: str
    runtime: str
