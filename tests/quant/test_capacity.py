"""What a machine has against what quantizing takes: measured where the output will lie, judged by G314 and G315."""

import os
from types import SimpleNamespace

import pytest

from doctor.api import check
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant import capacity
from doctor.quant.budget import constant

RECIPE = Recipe(group_size=32)


@pytest.fixture
def machine(monkeypatch):
    """Sets the free bytes of disk and memory; returns the paths whose disk was asked."""
    asked = []

    def have(disk, memory):
        monkeypatch.setattr(
            capacity.os,
            "statvfs",
            lambda path: asked.append(path) or SimpleNamespace(f_bavail=disk // 4096, f_frsize=4096),
        )
        monkeypatch.setattr(capacity, "free_memory", lambda: memory)
        return asked

    return have


def codes(folder, place):
    return [f.code for f in check(folder, RECIPE, capacity=place).findings]


def test_a_machine_with_plenty_gets_no_finding_and_the_nearest_directory_is_asked(tmp_path, machine):
    asked = machine(1 << 40, 1 << 40)
    assert codes(tiny().write(tmp_path / "model"), tmp_path / "not" / "yet") == []
    assert asked == [tmp_path]


def test_a_full_disk_and_a_full_memory_are_each_said(tmp_path, machine):
    folder = tiny().write(tmp_path / "model")
    machine(4096, 1 << 40)
    assert codes(folder, tmp_path) == ["G314"]
    machine(1 << 40, constant())
    assert codes(folder, tmp_path) == ["G315"]


def test_without_a_place_nothing_is_measured_and_the_rules_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "measure", lambda *a: pytest.fail("nobody asked"))
    report = check(tiny().write(tmp_path / "model"), RECIPE)
    runs = {r.rule.code: r for r in report.runs}
    assert "--capacity" in next(iter(runs["G314"].reasons)) and runs["G315"].status == "skipped"


def test_a_real_disk_can_be_asked(tmp_path):
    from doctor.checkpoint.directory import Checkpoint

    case = tiny()
    found = capacity.measure(Checkpoint.open(case.write(tmp_path)), case.spec, RECIPE, tmp_path / "out")
    stat = os.statvfs(tmp_path)
    assert found.disk_free <= stat.f_blocks * stat.f_frsize and found.memory_free > 0 and found.disk_need > 0
