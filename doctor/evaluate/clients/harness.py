"""Tasks of lm-evaluation-harness, by its own program in a process of its own, once for each model."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import _
from doctor.core.records import TaskScore

SECONDS = 24 * 3600


def require_harness(names: Sequence[str], python: str | None) -> None:
    """Raises DoctorError where the interpreter has no lm_eval: doctor's own, unless another is given."""
    if names and python is None and find_spec("lm_eval") is None:
        raise DoctorError(
            _("--tasks {names}: are lm-evaluation-harness's, which is not installed.", names=",".join(names)),
            _("`pip install lm_eval` brings it; --tasks choices needs nothing."),
        )


def run_tasks(
    original: Path, quantized: Path, names: Sequence[str], python: str | None = None, seconds: float = SECONDS
) -> list[TaskScore]:
    """A score for each task and metric of both checkpoints, in the order of the harness.

    Raises MachineError with the last lines of the harness where it ends with an error or writes nothing that is read.
    """
    before, after = (_results(folder, names, python, seconds) for folder in (original, quantized))
    found = []
    for task, metrics in before.items():
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            other = after.get(task, {}).get(key)
            if metric.endswith("_stderr") or not comma or not _number(value) or not _number(other):
                continue
            name = metric if filtered == "none" else key
            errors = [m.get(task, {}).get(f"{metric}_stderr,{filtered}") for m in (before, after)]
            low, high = (float(x) if _number(x) else float("nan") for x in errors)
            found.append(TaskScore(task, name, float(value), float(other), original_error=low, quantized_error=high))
    if not found:
        raise MachineError(_("lm_eval: gave no figure for {names}.", names=", ".join(names)))
    return found


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _results(folder: Path, names: Sequence[str], python: str | None, seconds: float) -> dict[str, dict[str, Any]]:
    """task -> metric -> value of one checkpoint."""
    with tempfile.TemporaryDirectory(prefix="doctor-tasks-") as place:
        command = [python or sys.executable, "-P", "-m", "lm_eval", "--model", "hf"]
        command += ["--model_args", f"pretrained={folder.resolve()}", "--tasks", ",".join(names)]
        command += ["--batch_size", "auto", "--output_path", str(Path(place) / "out")]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, cwd=place, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise MachineError(_("lm_eval: had not ended after {n:.0f} s.", n=seconds)) from None
        except OSError as error:
            raise MachineError(_("{path}: {error}.", path=command[0], error=error.strerror)) from None
        files = sorted((Path(place) / "out").rglob("results_*.json"))
        if run.returncode or not files:
            last = " | ".join(run.stderr.strip().splitlines()[-3:]) or _("no output")
            raise MachineError(_("lm_eval on {name}: {error}", name=folder.name, error=last))
        try:
            return dict(json.loads(files[-1].read_text(encoding="utf-8"))["results"])
        except (ValueError, KeyError, TypeError) as error:
            raise MachineError(_("lm_eval: its results cannot be read: {error}", error=str(error))) from None
