"""A measurement in a file: what every width would do to every linear, so that another budget costs no new one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.version import __version__
from doctor.fixing.filesystem import machine_errors
from doctor.quant.allocation.measure import Hurts

_MOST_BYTES = 1 << 28


def conditions(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a measurement to hold: the weights' headers and config.json, and the grids."""
    headers = sorted((t.name, t.dtype.name, t.shape) for t in checkpoint.tensors.values())
    sizes = sorted((e.name, e.size) for e in checkpoint.entries.values() if e.name.endswith(".safetensors"))
    mark = hashlib.sha256(repr((headers, sizes, checkpoint.json["config.json"].raw)).encode()).hexdigest()
    return {
        "checkpoint": mark,
        "method": recipe.method,
        "format": recipe.output_format,
        "group_size": recipe.group_size,
        "sym": bool(recipe.sym),
        "mse": recipe.mse,
        "act_order": recipe.act_order,
        "averaged": "by token",  # sensitivity.py; files of older versions lack it, and their figures are others
    }


def write(path: Path, stated: Mapping[str, Any], found: Mapping[str, Hurts]) -> None:
    """A new file, whole or absent. Raises MachineError."""
    value = {
        "doctor": __version__,
        "measured": "predicted KL in nats a token of each linear, by bits",
        **stated,
        "linears": {name: {str(bits): hurt for bits, hurt in hurts.items()} for name, hurts in found.items()},
    }
    beside = path.with_name(f".{path.name}.tmp")
    with machine_errors(path):
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)


def read(path: Path, stated: Mapping[str, Any]) -> dict[str, Hurts]:
    """The measurement of a file. Raises DoctorError where it is none, or holds for another checkpoint or recipe."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError
        value = json.loads(path.read_text(encoding="utf-8"))
        found = {
            str(name): {width_in(bits): float(hurt) for bits, hurt in hurts.items()}
            for name, hurts in value["linears"].items()
        }
        if not all(math.isfinite(hurt) and hurt >= 0 for hurts in found.values() for hurt in hurts.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DoctorError(
            _("--measurement {path}: holds no measurement of widths.", path=path),
            _("Name a new file: it is written, and read again for other budgets."),
        ) from None
    for key, wanted in stated.items():
        if value.get(key) != wanted:
            raise DoctorError(
                _(
                    "--measurement {path}: {key} was {old}; is {now}.",
                    path=path,
                    key=key,
                    old=_short(value.get(key)),
                    now=_short(wanted),
                ),
                _("A measurement holds for one checkpoint and one recipe: name another file."),
            )
    return found


def width_in(text: str) -> float:
    """A width as files and patterns hold it."""
    return float(text) if "." in text else int(text)


def _short(value: Any) -> str:
    return str(value)[:12]
