"""Ctrl-C in a terminal: what was found so far is printed, what was not looked at is said, and the exit code is 130."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from doctor import api
from doctor.core.facts import Unavailable
from doctor.core.store import Store
from doctor.lint.testing import tiny
from doctor.report import verdict
from doctor.scan import scan

# Reading takes a while and says when it has begun; the rest of the run is the command's own.
CHILD = """
import sys, time
from doctor.scan import scan
count = scan.counters.read_and_scan
def slow(*args):
    print("READING", file=sys.stderr, flush=True)
    result = count(*args)
    time.sleep(0.4)     # so that a busy machine types Ctrl-C before the last tensor was read
    return result
scan.counters.read_and_scan = slow
from doctor.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture
def broken(tmp_path):
    """A checkpoint whose first tensor holds NaN."""
    case = tiny("llama")
    case.tensors["model.embed_tokens.weight"][3, 5] = 0x7FC0
    return case.write(tmp_path / "m")


def _own_terminal():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a suite that was started in the background ignores it, and its children would too


def in_a_terminal(*args, after):
    """(exit code, what the terminal showed) of `doctor ARGS`, with Ctrl-C typed once `after` was shown three times."""
    keyboard, terminal = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "CI"} | {
        "TERM": "xterm-256color",
        "COLUMNS": "110",
        "LC_ALL": "C.UTF-8",
    }
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, args)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(terminal)
    shown, typed = "", False
    while True:
        try:
            part = os.read(keyboard, 4096)
        except OSError:  # the terminal closes with its last process
            break
        if not part:
            break
        shown += part.decode(errors="replace")
        if not typed and shown.count(after) >= 3:
            os.write(keyboard, b"\x03")
            typed = True
    os.close(keyboard)
    return child.wait(timeout=30), shown


def test_ctrl_c_prints_what_was_found_and_what_was_not_looked_at(broken, tmp_path):
    other = tiny("llama").write(tmp_path / "other")
    code, shown = in_a_terminal("check", broken, other, "--group-size", "32", "--config", "none", after="READING")
    assert code == 130 and "Traceback" not in shown
    assert "W201" in shown and "1 NaN" in shown
    assert "not looked at" in shown and f"Interrupted. Not checked: {other}." in shown.replace("\r\n", "")


def stop_after(monkeypatch, tensors):
    """Reading is interrupted by the user at this tensor."""
    work, seen = scan._scan_tensor, []

    def one(*args):
        seen.append(args)
        if len(seen) > tensors:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(scan, "_scan_tensor", one)


def test_a_partial_run_is_no_verdict_and_judges_nothing_that_needs_every_tensor(monkeypatch, tmp_path):
    stop_after(monkeypatch, 3)
    case = tiny("llama")
    report = api.check(case.write(tmp_path / "m"), case.recipe, keep_partial=True)
    stop = report.summary["interrupted"]
    assert 0 < stop["bytes_read"] < stop["bytes"] and 0 < stop["tensors_left"] < report.summary["tensors"]
    from doctor.report.formats.terminal import render

    assert verdict.verdict(report) == ("skipped", "interrupted: no verdict for gptq 4-bit g32")
    assert f"{stop['tensors_left']} tensors not looked at" in render([report]) and "✓ ready" not in render([report])
    assert not report.findings


def test_in_python_ctrl_c_is_raised(monkeypatch, tmp_path):
    stop_after(monkeypatch, 3)
    case = tiny("llama")
    with pytest.raises(KeyboardInterrupt):
        api.check(case.write(tmp_path / "m"), case.recipe)


def test_facts_of_every_subject_are_missing_where_only_some_were_read():
    store = Store()
    store.say_partial("values", "stopped")
    with pytest.raises(Unavailable, match="stopped"):
        store.value("every_stats")


TORCH = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
for _ in range(1000): pass  # where Python looks for signals
print("WHOLE", flush=True)
"""


def test_an_interrupt_while_torch_is_imported_waits_for_its_end(tmp_path):
    """torch's C++ aborts the process where a KeyboardInterrupt passes through it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    child = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child += "from doctor.cli import failures\nfrom doctor.quant import held_import\nheld_import.install()\n"
    child += "with failures.shown():\n    import torch\n"
    search = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", child], env=os.environ | search, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "WHOLE\n", "Interrupted.\n")
