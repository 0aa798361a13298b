"""Devices for the tests of kernels. A test belongs to a rung (rungs.py) by its marker or, when it runs on several
devices, by its device.
"""

import contextlib
import os
from collections import Counter

import host
import pytest
from rungs import RUNGS


def pytest_configure(config):
    for rung, meaning in RUNGS.items():
        config.addinivalue_line("markers", f"{rung}: {meaning}")


def rung_of(item):
    device = getattr(item, "callspec", None) and item.callspec.params.get("device")
    if device:
        return "R1" if device == "host" or os.environ.get("DOCTOR_PRETEND_GPU") else "R4"
    return next((rung for rung in RUNGS if item.get_closest_marker(rung)), None)


def pytest_runtest_setup(item):
    rung = rung_of(item)
    if rung is not None:
        item.user_properties.append(
            ("rung", rung)
        )  # it travels with the report, because tests may run in several processes


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


@pytest.fixture
def launched(host_engine, monkeypatch):
    """Launches by kernel, from here on."""
    counts, launch = Counter(), host_engine.launch

    def counted(kernel, *rest):
        counts[kernel] += 1
        return launch(kernel, *rest)

    monkeypatch.setattr(host_engine, "launch", counted)
    return counts


@pytest.fixture(params=["host", "gpu"])
def device(request):
    """(engine, torch device): the host build behind the real launcher, or a GPU."""
    import torch

    from doctor.quant.solve import cuda

    if request.param == "host":
        return request.getfixturevalue("host_engine"), torch.device("cpu")
    if os.environ.get(
        "DOCTOR_PRETEND_GPU"
    ):  # the lines of R4 on a device that is none: mistakes of the tests show here, not there
        from pretend import pretend

        request.getfixturevalue("pretended").enter_context(pretend(request.getfixturevalue("host_engine")))
        return request.getfixturevalue("host_engine"), torch.device("cuda", 0)
    reason = cuda.available("cuda")
    if reason:
        pytest.skip(f"no GPU run: {reason}")
    return cuda.engine_for(torch.device("cuda", 0)), torch.device("cuda", 0)


@pytest.fixture
def pretended():
    with contextlib.ExitStack() as stack:
        yield stack
