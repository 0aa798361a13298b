"""doctor.json of a quantized checkpoint: how it was made, without times, so that the same run writes the same bytes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from doctor.core.recipe import Recipe
from doctor.core.records import CalibrationFacts
from doctor.quant.earlier import versions
from doctor.quant.job import Result


def receipt(
    source: str, recipe: Recipe, calibration: CalibrationFacts | None, result: Result, notes: list[str]
) -> dict:
    """The receipt as JSON. source: the mark of what was quantized (earlier.source_mark). notes: sentences on what
    differed from what was asked.
    """
    linears = [{k: r[k] for k in ("name", "outcome", "solve")} for r in result.records]
    outcomes = {o: result.count(o) for o in sorted({r["outcome"] for r in result.records})}
    return json.loads(
        json.dumps(
            {
                **versions(),
                "source": source,
                "recipe": asdict(recipe),
                "calibration": None if calibration is None else asdict(calibration),
                "notes": notes,
                "outcomes": outcomes,
                "linears": _finite(linears),
            }
        )
    )


def _finite(value: Any) -> Any:
    """NaN and Inf as strings: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
