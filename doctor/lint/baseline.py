"""Baselines: a report compared with an earlier one, so that a run fails on new findings only."""

from dataclasses import replace

from doctor.core.finding import Finding
from doctor.lint.engine import Report, in_order


def compare_with(report: Report, baseline: Report) -> None:
    """Mark each finding as new or unchanged, and keep what only the baseline has.

    A finding is unchanged if the baseline has one of the same code at the same place; several at one place are counted.
    """
    left: dict[tuple[str, str], list[Finding]] = {}
    for item in [*baseline.findings, *baseline.suppressed]:
        left.setdefault((item.code, item.target), []).append(item)

    def state(item: Finding) -> str:
        rest = left.get((item.code, item.target))
        return "unchanged" if rest and rest.pop(0) else "new"

    report.findings = [replace(f, baseline_state=state(f)) for f in report.findings]
    report.suppressed = [replace(f, baseline_state=state(f)) for f in report.suppressed]
    hidden = {id(f) for f in baseline.suppressed}
    report.gone = in_order(
        [replace(f, baseline_state="absent") for rest in left.values() for f in rest if id(f) not in hidden]
    )
    report.baseline = baseline.checkpoint
