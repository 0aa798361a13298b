"""The five rungs that stand in for a GPU, counted over a run. Tests of tests/cuda say theirs in a property of their reports."""

from collections import Counter

RUNGS = {
    "R0": "the reference equals the definition",
    "R1": "the kernel source, built for the host, equals the reference",
    "R2": "nvcc and NVRTC compile every kernel without a warning or a spill",
    "R3": "goldens recorded on a device are reproduced",
    "R4": "kernels on a GPU equal the reference",
}
RESULTS = {rung: Counter() for rung in RUNGS}
REASONS = {rung: Counter() for rung in RUNGS}
REPORT_LINES = []


def count(report) -> None:
    """Take one test's report; where tests run in several processes it comes from another one."""
    properties = dict(report.user_properties)
    rung = properties.get("rung")
    if rung is None or not (report.when == "call" or report.skipped or report.failed):
        return
    RESULTS[rung]["passed" if report.passed else "skipped" if report.skipped else "failed"] += 1
    if report.skipped:
        REASONS[rung][str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    if "line" in properties:
        REPORT_LINES.append(properties["line"])


def summary(terminalreporter) -> None:
    """The lines that say on which rungs this run stood."""
    if not any(RESULTS.values()):
        return
    terminalreporter.section("kernels without a GPU: how far the proof went")
    for rung, meaning in RUNGS.items():
        counts = ", ".join(f"{RESULTS[rung][what]} {what}" for what in ("passed", "failed", "skipped") if RESULTS[rung][what])
        reasons = "; ".join(f"{n}x {reason}" for reason, n in REASONS[rung].items())
        terminalreporter.write_line(f"{rung} {meaning}: {counts or 'not run'}{f' ({reasons})' if reasons else ''}")
    for line in sorted(REPORT_LINES):
        terminalreporter.write_line(line)
