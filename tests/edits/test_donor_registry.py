"""A donor is opened once while it stays the same, and anew where something else lies under its name."""

import shutil

from doctor.edits.donor_registry import open_donor
from doctor.lint.testing import tiny


def test_another_checkpoint_under_the_same_relative_name_is_another_donor(tmp_path, monkeypatch):
    for place, hidden in (("one", 32), ("two", 64)):
        tiny("llama", hidden=hidden).write(tmp_path / place / "base")
    found = []
    for place in ("one", "two"):
        monkeypatch.chdir(tmp_path / place)
        found.append(open_donor("base"))
        assert open_donor("base") is found[-1]
    widths = [donor.tensors["model.norm.weight"].shape for donor in found]
    assert widths == [(32,), (64,)]
    shutil.rmtree("base")
    tiny("llama", hidden=32).write(tmp_path / "two" / "base")
    assert open_donor("base").tensors["model.norm.weight"].shape == (32,)
