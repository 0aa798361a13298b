"""A checkpoint that changes while it is read: an error that names the file, no wait, no byte from elsewhere."""

import os

import pytest

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.lint.testing import tiny

SHARD, JSON = "model-00001-of-00002.safetensors", "tokenizer.json"


@pytest.fixture
def opened(tmp_path):
    case = tiny("llama")
    case.shards = 2
    return Checkpoint.open(case.write(tmp_path / "m"))


def becomes_pipe(path):
    path.unlink()
    os.mkfifo(path)


def becomes_folder(path):
    path.unlink()
    path.mkdir()


def becomes_link(path):
    outside = path.parents[1] / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


CHANGES = {
    "is no regular file any more": (becomes_pipe, becomes_folder),
    "became a link to another file": (becomes_link,),
}


@pytest.mark.parametrize("said, change", [(said, change) for said, all_ in CHANGES.items() for change in all_])
def test_a_file_that_becomes_something_else_is_not_read(opened, said, change):
    for name, read in (
        (SHARD, lambda: check(opened, tiny().recipe)),
        (JSON, lambda: opened.read_file(JSON)),
        (JSON, lambda: opened.sha256(JSON)),
    ):
        if not (opened.root / name).is_symlink() and (opened.root / name).is_file():
            change(opened.root / name)
        with pytest.raises(BadCheckpoint, match=f"^{name}: {said}.*Run the command again"):
            read()


def test_a_shard_that_is_cut_is_named(opened):
    os.truncate(opened.root / SHARD, 300)
    with pytest.raises(BadCheckpoint, match=f"^{SHARD}: ends at byte .* it became shorter while it was read"):
        check(opened, tiny().recipe)


def test_a_link_that_was_there_before_is_followed_as_ever(tmp_path):
    folder = tiny("llama").write(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "blob")
    (folder / "model.safetensors").symlink_to("blob")
    assert check(folder, tiny().recipe).ok


def test_a_chat_template_too_large_to_read_crashes_no_rule_and_is_not_judged(tmp_path):
    folder = tiny("llama").write(tmp_path / "m")
    with open(folder / "chat_template.jinja", "wb") as file:
        file.truncate(3 << 30)
    report = check(folder, tiny().recipe)
    assert not report.crashed
    assert any("at most 4,194,304 are read" in reason for run in report.runs for reason in run.reasons)
