"""The five rungs that stand in for a GPU, counted over a run. Tests of tests/cuda say theirs in a property of their
reports.
"""

import os
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
PTXAS, NVRTC, FAULTS = (
    {},
    {},
    [],
)  # architecture: [bytes, {kernel: [registers, bytes spilled]}]; architecture: [bytes, versions]; planted faults
ALL = "DOCTOR_KERNEL_TABLE"  # set by `make kernels`: one line for each planted fault


def count(report) -> None:
    """Take one test's report; where tests run in several processes it comes from another one."""
    properties = dict(report.user_properties)
    rung = properties.get("rung")
    if rung is None or not (report.when == "call" or report.skipped or report.failed):
        return
    RESULTS[rung]["passed" if report.passed else "skipped" if report.skipped else "failed"] += 1
    if report.skipped:
        REASONS[rung][str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    if "ptxas" in properties:
        architecture, *PTXAS[architecture] = properties["ptxas"]
    if "nvrtc" in properties:
        architecture, size, version = properties["nvrtc"]
        known = NVRTC.setdefault(architecture, [0, version])
        known[0] += size
    if "fault" in properties:
        FAULTS.append(properties["fault"] if report.passed else None)


def summary(terminalreporter) -> None:
    """The lines that say on which rungs this run stood."""
    if not any(RESULTS.values()):
        return
    terminalreporter.section("kernels without a GPU: how far the proof went")
    for rung, meaning in RUNGS.items():
        counts = ", ".join(
            f"{RESULTS[rung][what]} {what}" for what in ("passed", "failed", "skipped") if RESULTS[rung][what]
        )
        reasons = "; ".join(f"{n}x {reason}" for reason, n in REASONS[rung].items())
        terminalreporter.write_line(f"{rung} {meaning}: {counts or 'not run'}{f' ({reasons})' if reasons else ''}")
    for line in (*registers(), *faults(os.environ.get(ALL))):
        terminalreporter.write_line(line)


def registers() -> list[str]:
    """Registers a thread of every kernel on every architecture, spills, and the size of all kernels together."""
    if not PTXAS:
        return []
    order = sorted(PTXAS)
    rows = [["registers", *(f"sm_{a}" for a in order)]]
    for name in sorted({name for _, table in PTXAS.values() for name in table}):
        cells = [PTXAS[a][1].get(name) for a in order]
        rows.append([name, *("" if c is None else f"{c[0]}{f' +{c[1]} spilled' if c[1] else ''}" for c in cells)])
    rows.append(["bytes spilled", *(str(sum(spilled for _, spilled in PTXAS[a][1].values())) for a in order)])
    rows.append(["KiB by nvcc", *(str(PTXAS[a][0] // 1024) for a in order)])
    if NVRTC:
        rows.append(
            [
                f"KiB by NVRTC {next(iter(NVRTC.values()))[1]}",
                *(str(NVRTC[a][0] // 1024) if a in NVRTC else "" for a in order),
            ]
        )
    return ["", *table(rows)]


def faults(whole: str | None) -> list[str]:
    """What became of the faults planted in the kernels: a line a source, or a table of all."""
    if not FAULTS:
        return []
    caught = sorted(f for f in FAULTS if f)
    by_source = Counter(source for source, *_ in caught)
    counts = ", ".join(f"{source} {n}" for source, n in sorted(by_source.items()))
    said = f"faults planted in the kernels: {len(caught)} of {len(FAULTS)} caught ({counts})"
    return (
        ["", *table([["source", "planted fault", "caught by"], *([a, b, c[:90]] for a, b, c in caught)]), said]
        if whole
        else ["", said]
    )


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
