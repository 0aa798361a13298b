"""The output is whole or absent, the source is never written to, and what is unchanged is not copied."""

import errno
import json
import os
import signal
import stat

import pytest

from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.core.errors import BadCheckpoint, MachineError, PlanRefused
from doctor.edits.kinds import PadTensor, ReplaceNonfinite, SetJson
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing import filesystem, overlay_writer, staging
from doctor.fixing.filesystem import Carry
from doctor.fixing.overlay_writer import write_overlay
from doctor.fixing.staging import hold_output, open_staging
from doctor.lint.testing import tiny


def sharded(tmp_path, shards=3):
    case = tiny()
    case.shards = shards
    return case, Checkpoint.open(case.write(tmp_path / "source"))


def one_value(source):
    return EditedCheckpoint(source, [SetJson("config.json", "/bos_token_id", 0, expect=1)])


def written(view, output, **options):
    with open_staging(view, output, **options) as stage:
        write_overlay(view, stage, carry=options.get("carry", Carry.AUTO))
        stage.commit()
    return stage


def snapshot(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_mode) for p in sorted(folder.iterdir())}


def assert_same_content(view, output):
    assert sorted(os.listdir(output)) == sorted(view.entries)
    for name in view.entries:
        with view.open_file(name) if name in view.shards else open(os.devnull, "rb") as file:
            want = file.read(0, file.size()) if name in view.shards else view.read_file(name)
        assert (output / name).read_bytes() == want, name


def test_output_has_the_views_bytes_and_the_source_is_untouched(tmp_path):
    case, source = sharded(tmp_path)
    before = snapshot(source.root)
    view = EditedCheckpoint(
        source,
        [
            PadTensor(case.name("down"), 1, 160),
            PadTensor(case.name("gate"), 0, 160),
            SetJson("config.json", "/bos_token_id", 0, expect=1),
        ],
    )
    stage = written(view, tmp_path / "out")
    assert_same_content(view, tmp_path / "out")
    assert snapshot(source.root) == before and sorted(os.listdir(tmp_path)) == ["out", "source"]
    assert {f.name for f in stage.files if f.how == "written"} == view.changed


def test_changing_one_json_value_writes_that_file_alone(tmp_path):
    _, source = sharded(tmp_path)
    stage = written(one_value(source), tmp_path / "out")
    assert [f.name for f in stage.files if f.how == "written"] == ["config.json"]
    assert {f.how for f in stage.files if f.name != "config.json"} <= {"copied", "reflinked"}
    before = snapshot(source.root)
    for path in (tmp_path / "out").iterdir():
        path.write_bytes(b"edited afterwards")
    assert snapshot(source.root) == before


def test_large_files_are_linked_and_it_is_said(tmp_path, monkeypatch):
    _, source = sharded(tmp_path)
    monkeypatch.setattr(overlay_writer, "reflink", lambda *_: False)
    size = source.entries["model-00001-of-00003.safetensors"].size
    monkeypatch.setattr(filesystem, "COPIED_BELOW", size)
    stage = written(one_value(source), tmp_path / "out")
    linked = [f.name for f in stage.files if f.how == "linked"]
    assert linked == [n for n in sorted(source.entries) if source.entries[n].size >= size]
    for name in linked:
        assert os.stat(tmp_path / "out" / name).st_ino == os.stat(source.root / name).st_ino
    assert f"linked: the same file as in {source.root}, so a change of one changes both" in stage.notes[0]
    stage = written(one_value(source), tmp_path / "every", carry=Carry.LINK)
    assert {f.how for f in stage.files} == {"written", "linked"}


def test_in_place_links_nothing(tmp_path, monkeypatch):
    _, source = sharded(tmp_path)
    monkeypatch.setattr(filesystem, "COPIED_BELOW", 0)
    before = {p.name: p.stat().st_ino for p in source.root.iterdir()}
    written(one_value(source), source.root, in_place=True)
    assert not {p.stat().st_ino for p in source.root.iterdir()} & set(before.values())
    assert {p.name: p.stat().st_ino for p in (tmp_path / "source.before-fix").iterdir()} == before


def test_copy_gives_files_of_their_own(tmp_path):
    _, source = sharded(tmp_path)
    view = one_value(source)
    stage = written(view, tmp_path / "out", carry=Carry.COPY)
    assert_same_content(view, tmp_path / "out")
    assert all(os.stat(tmp_path / "out" / n).st_nlink == 1 for n in source.entries)
    assert {f.how for f in stage.files} == {"written", "copied"}


def test_links_that_cross_file_systems_become_copies_and_it_is_said(tmp_path, monkeypatch):
    _, source = sharded(tmp_path)

    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(overlay_writer, "reflink", lambda *_: False)
    monkeypatch.setattr(filesystem, "COPIED_BELOW", 0)
    view = one_value(source)
    stage = written(view, tmp_path / "out")
    assert_same_content(view, tmp_path / "out")
    assert (
        len(stage.notes) == 1
        and "unchanged files are copied" in stage.notes[0]
        and "cannot be linked" in stage.notes[0]
    )


def test_without_copy_in_the_kernel_bytes_go_through_memory(tmp_path, monkeypatch):
    case, source = sharded(tmp_path)

    def no_copy(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "copy_file_range", no_copy)
    view = EditedCheckpoint(source, [PadTensor(case.name("down"), 1, 160)])
    written(view, tmp_path / "out", carry=Carry.COPY)
    assert_same_content(view, tmp_path / "out")


def test_symbolic_links_of_a_hub_cache_become_files(tmp_path):
    case = tiny()
    folder = case.write(tmp_path / "hub" / "models--a--b" / "snapshots" / "abc")
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    source = Checkpoint.open(folder)
    view = one_value(source)
    written(view, tmp_path / "out")
    assert_same_content(view, tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())


def test_written_files_follow_the_umask_not_0600(tmp_path):
    case, source = sharded(tmp_path)
    old = os.umask(0o022)
    try:
        written(EditedCheckpoint(source, [PadTensor(case.name("down"), 1, 160)]), tmp_path / "out")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir() if p.stat().st_nlink == 1} == {0o644}


def test_a_linked_file_that_others_cannot_read_is_said(tmp_path, monkeypatch):
    _, source = sharded(tmp_path)
    monkeypatch.setattr(overlay_writer, "reflink", lambda *_: False)
    monkeypatch.setattr(filesystem, "COPIED_BELOW", 1024)
    for name in source.shards:
        os.chmod(source.root / name, 0o600)
    assert written(one_value(source), tmp_path / "out").notes[1:] == [
        "model-00001-of-00003.safetensors and 2 more: linked, so still readable by the owner alone, as in the source; "
        "--copy gives mode 0644"
    ]
    assert not written(one_value(source), tmp_path / "copied", carry=Carry.COPY).notes


def test_folders_come_along_and_hidden_ones_are_named(tmp_path):
    _, source = sharded(tmp_path)
    (source.root / "1_Pooling").mkdir()
    (source.root / "1_Pooling" / "config.json").write_text("{}")
    (source.root / "1_Pooling" / "away").symlink_to("/etc/hostname")
    (source.root / ".git").mkdir()
    stage = written(one_value(Checkpoint.open(source.root)), tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert set(stage.not_carried) == {".git/", "1_Pooling/away"}


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_output_in_the_source_or_around_it_is_refused(tmp_path, where):
    _, source = sharded(tmp_path)
    with (
        pytest.raises(PlanRefused, match="the source is never written to"),
        open_staging(one_value(source), tmp_path / where, overwrite=True),
    ):
        pass


def test_existing_output_is_refused_unless_told_and_then_replaced(tmp_path):
    _, source = sharded(tmp_path)
    view, out = one_value(source), tmp_path / "out"
    out.mkdir()
    written(view, out)  # an empty directory is as good as none
    (out / "mine.txt").write_text("kept until the swap")
    with (
        pytest.raises(PlanRefused, match=r"exists and holds 9 files; an output must be new or empty. .*--overwrite"),
        open_staging(view, out),
    ):
        pass
    written(view, out, overwrite=True)
    assert_same_content(view, out)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_overwrite_replaces_checkpoints_only(tmp_path):
    _, source = sharded(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    with (
        pytest.raises(PlanRefused, match="holds 1 file, none of a checkpoint; --overwrite replaces checkpoints only"),
        open_staging(one_value(source), tmp_path / "thesis", overwrite=True),
    ):
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PlanRefused, match="exists and is not a directory"),
        open_staging(one_value(source), tmp_path / "file", overwrite=True),
    ):
        pass


def test_overwrite_without_an_exchange_moves_the_old_output_aside(tmp_path, monkeypatch):
    _, source = sharded(tmp_path)
    view, out = one_value(source), tmp_path / "out"
    written(view, out)
    monkeypatch.setattr(staging, "exchange", lambda *_: False)
    written(view, out, overwrite=True)
    assert_same_content(view, out)
    real = os.rename

    def fails_once(a, b):
        if str(b).endswith("/out") and "stage" in str(a):
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(MachineError, match="Input/output error"):
        written(view, out, overwrite=True)
    assert_same_content(view, out)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path, monkeypatch):
    case, source = sharded(tmp_path)
    real = os.statvfs(tmp_path)

    class Small:
        f_bavail, f_frsize = 3, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    view = EditedCheckpoint(source, [PadTensor(case.name("down"), 1, 160)])
    with (
        pytest.raises(MachineError, match=rf"{3 * real.f_frsize:,} bytes are free; 1,[\d,]+ will be written"),
        open_staging(view, tmp_path / "out"),
    ):
        pass
    assert os.listdir(tmp_path) == ["source"]


def test_an_error_or_an_interrupt_leaves_nothing_behind(tmp_path):
    _, source = sharded(tmp_path)
    for error in (ValueError("ours"), KeyboardInterrupt()):
        overlay = one_value(source)
        with pytest.raises(type(error)), open_staging(overlay, tmp_path / "out") as stage:
            write_overlay(overlay, stage)
            raise error
        assert os.listdir(tmp_path) == ["source"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    _, source = sharded(tmp_path)
    calls = []

    def meddle(_):
        if not calls:
            (source.root / "config.json").write_text("{}")
        calls.append(1)

    overlay = one_value(source)
    with (
        pytest.raises(BadCheckpoint, match="the files changed while they were read"),
        open_staging(overlay, tmp_path / "out", progress=meddle) as stage,
    ):
        write_overlay(overlay, stage)
    assert os.listdir(tmp_path) == ["source"]


def test_what_killed_runs_left_is_removed_and_what_they_moved_is_put_back(tmp_path):
    _, source = sharded(tmp_path)
    out = tmp_path / "out"
    for kind in ("stage", "fetch", "old"):
        (tmp_path / f".out.doctor-{kind}").mkdir()
    (tmp_path / ".out.doctor-old" / "config.json").write_text("{}")
    (tmp_path / ".other.doctor-stage").mkdir()
    with hold_output(out) as notes:
        assert len(notes) == 3 and "is back" in notes[0]
        view = one_value(source)
        with pytest.raises(PlanRefused, match="exists and holds 1 file"), open_staging(view, out):
            pass
    assert (out / "config.json").read_text() == "{}"
    assert sorted(os.listdir(tmp_path)) == [".other.doctor-stage", "out", "source"]


def test_one_file_in_gives_one_file_out(tmp_path):
    case = tiny()
    case.down()[0, 0] = 0x7FC0
    source = Checkpoint.open(case.write(tmp_path / "source") / "model.safetensors")
    view = EditedCheckpoint(source, [ReplaceNonfinite(case.name("down"))])
    written(view, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    assert Checkpoint.open(tmp_path / "out").load(case.name("down"))[0, 0] == 0


def test_a_file_that_bears_the_receipts_name_is_said_to_be_missing(tmp_path):
    _, source = sharded(tmp_path)
    for text, notes in (("[1]", 1), ("rubbish", 1), ('{"schema": "mine"}', 1), ('{"schema": "doctor.receipt/1"}', 0)):
        (source.root / "doctor.json").write_text(text)
        stage = written(one_value(Checkpoint.open(source.root)), tmp_path / f"out{len(text)}")
        assert len(stage.notes) == notes == len(stage.not_carried) and all(
            "is not a receipt and is not in the output" in n for n in stage.notes
        )


def test_index_is_written_with_the_new_size(tmp_path):
    case, source = sharded(tmp_path)
    written(EditedCheckpoint(source, [PadTensor(case.name("down"), 1, 160)]), tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == Checkpoint.open(tmp_path / "out").total_bytes


def test_a_run_killed_while_it_tries_to_share_blocks_leaves_nothing_that_the_next_does_not_remove(
    tmp_path, monkeypatch
):
    _, source = sharded(tmp_path)
    before = sorted(os.listdir(tmp_path))

    def killed(_source, probe):
        probe.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if not pid:
        monkeypatch.setattr(staging, "reflink", killed)
        with open_staging(one_value(source), tmp_path / "out"):
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with hold_output(tmp_path / "out") as notes:
        assert [str(n) for n in notes] == ["removed .out.doctor-stage, left by a run that was killed"]
    assert [n for n in sorted(os.listdir(tmp_path)) if not n.endswith(".doctor-lock")] == before
