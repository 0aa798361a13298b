"""A fix in place: the directory changes names with its fixed copy, any kill leaves one of the two states, undo goes
back.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from doctor.api import check, fix, recover, undo
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.fixing import in_place
from doctor.fixing.filesystem import sha256
from doctor.lint.testing import tiny
from doctor.report.plan_text import render_plan

KILLS = int(os.environ.get("DOCTOR_TEST_KILLS", "4"))


def digests(folder):
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != "doctor.json"}


@pytest.fixture
def spoiled(tmp_path):
    case = tiny()
    case.shards = 2
    case.json["generation_config.json"]["eos_token_id"] = 0
    return case.write(tmp_path / "model")


def names(folder):
    return sorted(p.name for p in folder.parent.iterdir())


def fix_in_place(folder, **options):
    return fix(folder, None, tiny().recipe, in_place=True, **options)


def test_a_fix_in_place_keeps_what_was_there_and_undo_puts_it_back(spoiled):
    before = digests(spoiled)
    result = fix_in_place(spoiled)
    assert names(spoiled) == ["model", "model.before-fix"] and digests(
        in_place.kept_name(spoiled)
    ) == before != digests(spoiled)
    assert not check(spoiled, tiny().recipe).findings
    assert json.loads((spoiled / "doctor.json").read_text())["kept"] == "model.before-fix"
    assert f"undo: doctor undo {spoiled}" in render_plan(result)
    assert undo(spoiled) == [
        f"{spoiled} is as it was before the fix. The fixed copy matched its receipt and is removed"
    ]
    assert names(spoiled) == ["model"] and digests(spoiled) == before


def test_undo_keeps_a_fixed_copy_that_was_changed_since(spoiled):
    before = digests(spoiled)
    fix_in_place(spoiled)
    (spoiled / "notes.txt").write_text("mine")
    (text,) = undo(spoiled)
    assert "was changed since (notes.txt), so it is kept as" in text
    assert names(spoiled) == ["model", "model.after-fix"] and digests(spoiled) == before


def test_undo_without_renameat2_does_the_same(spoiled, monkeypatch):
    before = digests(spoiled)
    monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    fix_in_place(spoiled)
    assert digests(in_place.kept_name(spoiled)) == before and names(spoiled) == ["model", "model.before-fix"]
    undo(spoiled)
    assert digests(spoiled) == before and names(spoiled) == ["model"]


def test_what_cannot_be_undone_is_said(spoiled, tmp_path):
    with pytest.raises(BadCheckpoint, match=r"holds no receipt of doctor \(doctor.json\), so there is nothing to undo"):
        undo(spoiled)
    fix(spoiled, tmp_path / "out", tiny().recipe)
    with pytest.raises(
        PlanRefused, match="was written with -o, so its source was never changed and nothing can be undone"
    ):
        undo(tmp_path / "out")
    fix_in_place(spoiled)
    os.rename(in_place.kept_name(spoiled), tmp_path / "elsewhere")
    with pytest.raises(PlanRefused, match="does not exist; what the fix replaced was deleted"):
        undo(spoiled)


def test_what_is_not_fixed_in_place(spoiled, tmp_path):
    os.symlink(spoiled, tmp_path / "link")
    with pytest.raises(PlanRefused, match="is not a plain directory; only a plain directory is fixed in place"):
        fix_in_place(tmp_path / "link")
    in_place.kept_name(spoiled).mkdir()
    with pytest.raises(PlanRefused, match="holds what an earlier fix in place replaced"):
        fix_in_place(spoiled)


def test_nothing_to_fix_in_place_changes_nothing(tmp_path):
    folder = tiny().write(tmp_path / "model")
    assert fix_in_place(folder).receipt_path is None and names(folder) == ["model"]
    assert fix_in_place(folder, dry_run=True).receipt_path is None and recover(folder) == []


@pytest.mark.parametrize("state", ["before", "after", "between"])
def test_each_state_that_a_kill_leaves_is_finished_or_taken_back(tmp_path, state):
    path, new = tmp_path / "model", tmp_path / "stage"
    for folder, text in ((path, "old"), (new, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    record = {"old": path.stat().st_ino, "new": new.stat().st_ino}
    in_place._write_journal(in_place._journal(path), record)
    kept = in_place.kept_name(path)
    os.rename(new, kept)
    if state == "after":
        assert in_place.exchange(kept, path)
    elif state == "between":
        os.rename(kept, new)
        os.rename(path, kept)
    notes = recover(path)
    assert (path / "file").read_text() == ("new" if state == "after" else "old") and bool(notes) == (state != "after")
    assert kept.exists() == (state == "after") and not in_place._journal(path).exists()


def undo_state(path, state):
    """The directories and the journal as a kill in the middle of an undo leaves them."""
    kept, after = in_place.kept_name(path), in_place.after_name(path)
    record = {"old": kept.stat().st_ino, "new": path.stat().st_ino, "undo": []}
    in_place._write_journal(in_place._journal(path), record)
    if state in ("exchanged", "set aside", "half removed"):
        assert in_place.exchange(kept, path)
    if state in ("set aside", "half removed"):
        os.rename(kept, after)
    if state == "half removed":
        next(after.glob("*.safetensors")).unlink()
    if state == "between":
        os.rename(path, after)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("state", ["nothing yet", "exchanged", "set aside", "half removed", "between"])
def test_an_undo_that_was_killed_is_carried_to_its_end(spoiled, monkeypatch, state, atomic):
    before = digests(spoiled)
    fix_in_place(spoiled)
    undo_state(spoiled, state)
    if not atomic:
        monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    notes = undo(spoiled)
    assert digests(spoiled) == before and names(spoiled) == ["model"] and not in_place._journal(spoiled).exists()
    assert (
        len(notes) == 1
        and "is as it was before the fix" in notes[0]
        and ("was killed" in notes[0]) == (state != "nothing yet")
    )
    assert recover(spoiled) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_an_undo_in_which_any_call_fails_can_be_repeated(spoiled, monkeypatch, atomic):
    before = digests(spoiled)
    if not atomic:
        monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    saved = {name: getattr(os, name) for name in ("open", "rename", "fsync", "unlink")}
    failed = 0
    for n in range(1, 40):
        fix_in_place(spoiled)
        calls = [0]
        for name, real in saved.items():

            def call(*args, real=real, calls=calls, n=n, **more):
                calls[0] += 1
                if calls[0] == n:
                    raise OSError(5, "Input/output error")
                return real(*args, **more)

            monkeypatch.setattr(os, name, call)
        try:
            undo(spoiled)
        except Exception as error:
            assert type(error).__name__ in ("MachineError", "BadCheckpoint", "OSError"), error
            failed += 1
        for name, real in saved.items():
            monkeypatch.setattr(os, name, real)
        if in_place.kept_name(spoiled).exists() or in_place._journal(spoiled).exists():
            undo(spoiled)
        assert digests(spoiled) == before and set(names(spoiled)) <= {
            "model",
            "model.after-fix",
            ".model.doctor-lock",
        }, n
        if in_place.after_name(
            spoiled
        ).exists():  # files of the copy that could not be read count as changed, and it is kept
            subprocess.run(["rm", "-r", str(in_place.after_name(spoiled))], check=True)
        if calls[0] < n:
            break
    assert failed >= 4 and calls[0] < n


def test_a_checkpoint_that_another_process_works_on_is_left_alone(spoiled):
    in_place._write_journal(in_place._journal(spoiled), {"old": 1, "new": 2})
    script = f"from doctor.fixing.lock import hold\nfrom pathlib import Path\nwith hold(Path({str(spoiled)!r})):\n"
    child = subprocess.Popen(
        [sys.executable, "-c", script + "    print(1, flush=True)\n    input()\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    for work in (recover, undo, fix_in_place):
        with pytest.raises(PlanRefused, match=f"process {child.pid} on .* is writing it"):
            work(spoiled)
    child.communicate(b"\n")
    recover(spoiled)
    assert not in_place._journal(spoiled).exists()


def rewritten(spoiled, **changes):
    """The receipt of a fix in place, with other values."""
    fix_in_place(spoiled)
    receipt = json.loads((spoiled / "doctor.json").read_text())
    (spoiled / "doctor.json").write_text(json.dumps({**receipt, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"written": [{"file": "../precious", "bytes": 8, "sha256_after": "0"}]},
        {"written": [{"file": "/etc/passwd", "bytes": 8, "sha256_after": "0"}]},
        {"written": [{"file": 7, "bytes": 8, "sha256_after": "0"}]},
        {"written": [{"file": "config.json", "bytes": "8", "sha256_after": "0"}]},
        {"written": [{"file": "config.json", "bytes": 8}]},
        {"written": {"file": "config.json"}},
        {"unchanged": None},
        {"unchanged": ["x"]},
    ],
)
def test_a_receipt_that_no_fix_wrote_is_refused_and_nothing_is_touched(spoiled, changes):
    rewritten(spoiled, **changes)
    before = {p.name: p.stat().st_ino for p in spoiled.iterdir()}
    with pytest.raises(BadCheckpoint, match=r"doctor.json: (written|unchanged) is not what a fix writes"):
        undo(spoiled)
    assert {p.name: p.stat().st_ino for p in spoiled.iterdir()} == before
    assert names(spoiled) == ["model", "model.before-fix"]


def test_a_pipe_or_device_among_the_files_is_a_change_and_is_never_read(spoiled):
    fix_in_place(spoiled)
    os.mkfifo(spoiled / "pipe")
    (spoiled / "tokenizer.json").unlink()
    (spoiled / "tokenizer.json").symlink_to("/dev/zero")
    (text,) = undo(spoiled)
    assert "was changed since (pipe and 1 more), so it is kept as" in text


def test_an_unchanged_file_that_was_edited_to_the_same_length_keeps_the_copy(spoiled):
    fix_in_place(spoiled)
    file = spoiled / "tokenizer.json"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    (text,) = undo(spoiled)
    assert "was changed since (tokenizer.json), so it is kept as" in text


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "text", "list", "names"])
def test_a_journal_that_is_no_journal_is_removed(spoiled, kind):
    journal, before = in_place._journal(spoiled), digests(spoiled)
    if kind == "pipe":
        os.mkfifo(journal)
    elif kind == "device":
        journal.symlink_to("/dev/zero")
    else:
        journal.write_text(
            {"huge": "[" * 100_000, "text": "no", "list": "[1]", "names": '{"old": 1, "new": 2, "undo": 3}'}[kind]
        )
    assert recover(spoiled) == [] and digests(spoiled) == before and names(spoiled) == ["model"]


@pytest.mark.parametrize("atomic", [True, False])
def test_a_failing_rename_leaves_the_checkpoint_as_it_was(spoiled, monkeypatch, atomic):
    before = digests(spoiled)
    real = os.rename
    if not atomic:
        monkeypatch.setattr(in_place, "exchange", lambda one, other: False)
    for n in range(1, 9):
        calls = [0]

        def rename(*args, n=n, calls=calls):
            calls[0] += 1
            if calls[0] == n:
                raise OSError(5, "Input/output error")
            return real(*args)

        monkeypatch.setattr(os, "rename", rename)
        try:
            fix_in_place(spoiled)
            done = True
        except Exception as error:
            done = False
            assert type(error).__name__ == "MachineError", error
        monkeypatch.setattr(os, "rename", real)
        recover(spoiled)
        if done:
            assert calls[0] < n
            break
        assert digests(spoiled) == before and names(spoiled) == ["model"], (n, names(spoiled))
    assert done


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_checkpoint(spoiled):
    before = digests(spoiled)
    fix_in_place(spoiled)
    after = digests(spoiled)
    undo(spoiled)
    script = (
        "import sys\nfrom doctor.api import fix, recover, undo\nfrom doctor.lint.testing import tiny\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"path = {str(spoiled)!r}\n"
        "while True:\n    fix(path, None, tiny('llama').recipe, in_place=True)\n    undo(path)\n"
    )
    draw = random.Random(3)
    child = None
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.flush()
        time.sleep(draw.uniform(0.0, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
        recover(spoiled)
        found = digests(spoiled)
        assert found in (before, after)
        if found == after:
            undo(spoiled)
        # A stage and a lock are the next run's to remove; nothing else is left of a run or of an undo.
        assert [n for n in names(spoiled) if not n.endswith((".doctor-stage", ".doctor-lock"))] == ["model"]
    assert digests(spoiled) == before
