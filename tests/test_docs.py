"""What is written about the program is what the program is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_rule_pages_and_the_readmes_table_are_not_stale():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate_docs.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr + "\nrun: make docs"


def test_every_command_stands_in_the_readme():
    from doctor.cli.main import cli

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in cli.commands:
        assert f"doctor {name}" in readme, f"README does not show doctor {name}"


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_readmes_commands_are_targets(command):
    assert f"    {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_examples_of_the_python_page_run(tmp_path):
    import doctest

    from doctor.lint.testing import tiny

    case = tiny()
    case.down()[3, 5] = 0x7FC0
    values = {"model": str(case.write(tmp_path / "model")), "out": str(tmp_path / "out")}
    found = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False, globs=values, encoding="utf-8")
    assert found.attempted > 5 and not found.failed


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "README.zh.md",
        "docs/before-you-quantize.md",
        "docs/pipelines.md",
        "docs/python.md",
        "docs/reports.md",
        "docs/verify.md",
        "docs/kvcache.md",
        "docs/gpu.md",
        "docs/fixing.md",
        "docs/hub.md",
        "docs/configuration.md",
    ],
)
def test_commands_options_and_links_of_a_page_exist(page):
    import re

    from doctor.cli.main import cli

    text = (ROOT / page).read_text(encoding="utf-8")
    for command, rest in re.findall(r"(?:`|\n    |\$ |run: |entry: )(?:\S*/)?doctor ([a-z]+)([^`\n]*)", text):
        known = {
            option
            for parameter in cli.commands[command].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = set(re.findall(r"(?<= )--[a-z-]+", rest))
        assert used <= known, f"{page}: doctor {command} has no {used - known}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link} is not there"


def test_every_kernel_stands_on_the_gpus_page():
    import re

    page = (
        (ROOT / "docs" / "gpu.md")
        .read_text(encoding="utf-8")
        .replace("`_2`, `_4`, `_wide`", "`grid_search_2`, `grid_search_4`, `grid_search_wide`")
    )
    for source in (ROOT / "cuda").glob("*.cu"):
        rows = [line for line in page.splitlines() if f"| {source.name} |" in line]
        names = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
        assert names == set(re.findall(r"HOST_ENTRY\((\w+)\)", source.read_text())), source.name


@pytest.mark.parametrize("command", ["make demo", "make test"])
def test_the_chinese_readme_has_the_same_two_commands(command):
    assert f"    {command}\n" in (ROOT / "README.zh.md").read_text(encoding="utf-8")
