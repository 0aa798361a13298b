"""The harness of `make faults` finds what it is there for, and fix, fix in place and undo hold a sample of it."""

import random

import faults
import pytest
from faults import COMMANDS, WRITES, Command, Trials, ensure, files, full, kill


def two_files(work):
    """A command that writes its output where it will lie, as no command of doctor may."""
    (work / "out").mkdir()
    for name in ("a", "b"):
        (work / "out" / name).write_bytes(b"x" * 10)


@pytest.fixture
def careless(tmp_path):
    command = Command("careless", lambda work: None, two_files, ensure("out", two_files), lambda w: files(w / "out"))
    return Trials(command, tmp_path)


def test_an_output_that_grows_in_its_place_is_found_at_every_call_of_it(careless, capsys):
    assert careless.every_call(WRITES, kill, 99) == 5  # mkdir, and open and write of two files
    cut = [text for text in careless.bad if "not whole" in text]
    assert len(cut) == 4 and "call 2, open('" in cut[0] and "call 3, write('" in cut[1]  # after mkdir it is there


def test_the_write_of_a_file_object_meets_a_full_disk(careless, capsys):
    careless.every_call(WRITES, full, 99)
    assert any(", write('" in text and "not with an error of ours" in text for text in careless.bad)


@pytest.mark.parametrize("command", COMMANDS[:3], ids=lambda command: command.name)
def test_killed_or_on_a_full_disk_a_fix_leaves_nothing_half(command, tmp_path):
    trials = Trials(command, tmp_path)
    for first in (5, 23, 41):
        trials.every_call(faults.CALLS, kill, first + 1, first)
        trials.every_call(WRITES, full, first + 1, first)
    trials.random_kills(5, random.Random(7))
    assert trials.bad == []
