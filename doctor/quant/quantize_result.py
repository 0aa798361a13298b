"""What `quantize` returns. Needs no torch: what headers refuse is returned before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from doctor.core.records import CalibrationFacts
from doctor.lint.engine import Report

if TYPE_CHECKING:
    from doctor.quant.preflight import Forecast


@dataclass
class QuantizeResult:
    """What a run did. output is None where nothing was written: report then holds the findings that forbade it.

    linears: one dict a linear (name, block, role, outcome, solve, hessian, seconds); the same as report.linears.
    """

    report: Report
    output: Path | None = None
    calibration: CalibrationFacts | None = None
    notes: list[str] = field(default_factory=list)
    forecast: Forecast | None = None  # of a preflight

    @property
    def linears(self) -> list[dict]:
        return self.report.linears
