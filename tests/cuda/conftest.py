"""The five rungs that stand in for a GPU, and the lines that say on which of them this run stood.

A test belongs to a rung by its marker or, when it runs on several devices, by its device.
"""

import contextlib
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import host  # noqa: E402

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


def pytest_configure(config):
    for rung, meaning in RUNGS.items():
        config.addinivalue_line("markers", f"{rung}: {meaning}")


def rung_of(item):
    device = getattr(item, "callspec", None) and item.callspec.params.get("device")
    if device:
        return {"host": "R1", "gpu": "R4"}[device]
    return next((rung for rung in RUNGS if item.get_closest_marker(rung)), None)


def pytest_runtest_setup(item):
    rung = rung_of(item)
    if rung is not None:
        item.user_properties.append(("rung", rung))  # it travels with the report, because tests may run in several processes


def pytest_runtest_logreport(report):
    properties = dict(report.user_properties)
    rung = properties.get("rung")
    if rung is None or not (report.when == "call" or report.skipped or report.failed):
        return
    RESULTS[rung]["passed" if report.passed else "skipped" if report.skipped else "failed"] += 1
    if report.skipped:
        REASONS[rung][str(report.longrepr[2]).removeprefix("Skipped: ")] += 1
    if "line" in properties:
        REPORT_LINES.append(properties["line"])


def pytest_terminal_summary(terminalreporter):
    if not any(RESULTS.values()):
        return
    terminalreporter.section("kernels without a GPU: how far the proof went")
    for rung, meaning in RUNGS.items():
        counts = ", ".join(f"{RESULTS[rung][what]} {what}" for what in ("passed", "failed", "skipped") if RESULTS[rung][what])
        reasons = "; ".join(f"{count}x {reason}" for reason, count in REASONS[rung].items())
        terminalreporter.write_line(f"{rung} {meaning}: {counts or 'not run'}{f' ({reasons})' if reasons else ''}")
    for line in sorted(REPORT_LINES):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def torch_is_the_reference(monkeypatch):
    """grid.py and gptq.py may use the native CPU library: another optimisation, and not the definition."""
    monkeypatch.setenv("DOCTOR_NATIVE", "0")


@pytest.fixture(scope="session")
def host_builds(tmp_path_factory):
    """Folder of <source>.so for every kernel source."""
    if host.COMPILER is None:
        pytest.skip("no g++ here: the kernel source cannot be built for the host")
    folder = tmp_path_factory.mktemp("builds")
    for source in host.SOURCES:
        host.build(source, folder)
    return folder


@pytest.fixture(scope="session")
def host_engine(host_builds, tmp_path_factory):
    return host.engine(tmp_path_factory.mktemp("host"), host_builds)


@pytest.fixture(params=["host", "gpu"])
def device(request):
    """(engine, torch device): the host build behind the real launcher, or a GPU."""
    import torch

    from doctor.quant import kernels

    if request.param == "host":
        return request.getfixturevalue("host_engine"), torch.device("cpu")
    if os.environ.get("DOCTOR_PRETEND_GPU"):    # the lines of R4 on a device that is none: mistakes of the tests show here, not there
        from pretend import pretend

        request.getfixturevalue("pretended").enter_context(pretend(request.getfixturevalue("host_engine")))
        return request.getfixturevalue("host_engine"), torch.device("cuda", 0)
    reason = kernels.available("cuda")
    if reason:
        pytest.skip(f"no GPU run: {reason}")
    return kernels.engine_for(torch.device("cuda", 0)), torch.device("cuda", 0)


@pytest.fixture
def pretended():
    with contextlib.ExitStack() as stack:
        yield stack
