"""One writer an output: a living one is respected, a dead one or a reused process number is none."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from doctor.core.errors import MachineError, PlanRefused
from doctor.fixing import lock
from doctor.fixing.lock import hold, lock_name, started


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def record(output, **changes):
    lock_name(output).write_text(json.dumps({**lock._me(), **changes}))


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def refuse(_fd, _how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_names_its_holder_and_is_gone_afterwards(output):
    with hold(output):
        found = json.loads(lock_name(output).read_text())
        assert found["pid"] == os.getpid() and found["start"] == started(os.getpid()) and found["host"]
        with hold(output) as first:
            assert first is False
        assert lock_name(output).exists()
    assert os.listdir(output.parent) == []


def test_another_thread_is_another_run(output):
    refused = []

    def work():
        try:
            with hold(output):
                pass
        except PlanRefused as error:
            refused.append(error.message)

    with hold(output):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} on " in refused[0]


def test_a_killed_holder_is_none(output):
    script = f"from doctor.fixing.lock import hold\nfrom pathlib import Path\nwith hold(Path({str(output)!r})):\n"
    child = subprocess.Popen(
        [sys.executable, "-c", script + "    print(1, flush=True)\n    input()\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    with pytest.raises(PlanRefused, match=f"process {child.pid} on "), hold(output):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with hold(output) as first:
        assert first


def test_without_locks_the_record_decides_and_a_reused_number_is_no_holder(output, no_locks):
    record(output, pid=os.getppid(), start=started(os.getppid()))
    with pytest.raises(PlanRefused, match=f"process {os.getppid()} on "), hold(output):
        pass
    for dead in ({"pid": os.getppid(), "start": "1"}, {"pid": 2**22 + 1, "start": "1"}, {"pid": "x"}, {"host": None}):
        record(output, **dead)
        with hold(output):
            pass


def test_a_holder_on_another_machine_is_respected_and_one_of_an_earlier_boot_is_not(output):
    record(output, host="elsewhere", boot="another")
    with pytest.raises(PlanRefused, match=rf"on elsewhere is writing it. .* delete {lock_name(output)}"), hold(output):
        pass
    record(output, boot="another", pid=1)
    with hold(output):
        pass
    record(output, host="a container of this machine", pid=1)
    with hold(output):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 4000, "x" * 10_000])
def test_a_lock_that_says_nothing_is_taken(output, text):
    lock_name(output).write_text(text)
    with hold(output):
        pass


def test_a_lock_that_is_a_link_or_a_pipe_is_not_followed(output, tmp_path):
    (tmp_path / "precious").write_text("kept")
    lock_name(output).symlink_to(tmp_path / "precious")
    with pytest.raises(MachineError, match="doctor-lock: "), hold(output):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
