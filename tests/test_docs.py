"""What is written about the program is what the program is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_rule_pages_and_the_readmes_table_are_not_stale():
    run = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr + "\nrun: make docs"


def test_every_command_stands_in_the_readme():
    from doctor.cli import cli

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f"doctor {name}" in readme, f"README does not show doctor {name}"


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readmes_commands_are_targets(command):
    assert f"    {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
