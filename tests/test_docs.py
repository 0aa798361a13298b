"""What is written about the program is what the program is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A page on PyPI has no neighbours: links in the READMEs are whole addresses.
REPOSITORY = "https://(?:github|raw.githubusercontent).com/checkpoint-doctor/checkpoint-doctor/(?:(?:blob|tree)/)?main/"


def test_rule_pages_and_their_table_are_not_stale():
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
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/before-you-quantize.md",
        "docs/pipelines.md",
        "docs/python.md",
        "docs/reports.md",
        "docs/verify.md",
        "docs/kvcache.md",
        "docs/advise.md",
        "docs/serving.md",
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
    for link in re.findall(rf"\]\({REPOSITORY}([^)#]+)\)", text):
        assert (ROOT / link).exists(), f"{page}: {link} is not there"


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


def test_the_readmes_are_short_and_their_links_are_whole():
    import re

    for page in ("README.md", "README.zh.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 150 and "cure" not in text
        assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", text)), page
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size < 200_000


def test_what_the_architecture_names_is_there():
    import re

    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in re.findall(r"\b(?:doctor|rules|cuda|cpu|tests)/[\w/.]*", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    levels = (ROOT / "tests" / "test_levels.py").read_text(encoding="utf-8")
    wings = re.findall(r'^    "(\w+)",$', levels.split("WINGS = (")[1].split("\n)")[0], re.M)
    picture = text.split("```")[1]
    assert [line.split()[0] for line in picture.strip().splitlines()] == wings[::-1]


def test_the_guide_to_a_first_rule_works_word_for_word(tmp_path):
    """The commands that start and list, the file that it shows, and the laws that every rule keeps."""
    import re

    from doctor.api import check
    from doctor.lint.engine import load_rules
    from doctor.lint.rule import RULES

    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (tools/new_rule.py \S+ .*)$", guide, re.M)
    made = subprocess.run(
        [sys.executable, *command.split(), "--into", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert made.returncode == 0, made.stderr
    (path,) = tmp_path.glob("*.py")
    assert f"`rules/{path.name}`" in guide
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    path.write_text(code)
    entry = next(r for r in load_rules((tmp_path,)) if r.name == "zero-initializer-range")
    try:
        module = sys.modules[entry.module]
        (bad, message), good = module.bad(), module.good()
        for case, want in ((bad, [message]), (good, [])):
            report = check(case.write(tmp_path / str(len(want))), case.recipe, rules_dirs=(tmp_path,))
            assert [f.message for f in report.findings] == want and not report.crashed
            assert next(r for r in report.runs if r.rule.code == entry.code).judged
        for section in ("Why", "Do", "False alarms", "Fix safety", "Sources"):
            assert len(entry.section(section)) > 3
    finally:
        RULES.pop(entry.code, None)
        sys.modules.pop(entry.module, None)


def test_a_started_rule_fails_until_it_is_filled_in(tmp_path):
    import new_rule

    text = new_rule.write(tmp_path, "W999", "made-up", "error", "tensor", ["n_nan"]).read_text()
    assert text.startswith('"""W999 made-up: ') and "def made_up(tensor, n_nan):" in text and '"error")' in text
    compile(text, "w999_made_up.py", "exec")
    for code, name in (("W999", "other"), ("W998", "made-up"), ("X001", "x"), ("W998", "Made Up")):
        with pytest.raises(SystemExit):
            new_rule.write(tmp_path, code, name, "error", "tensor", [])
    assert new_rule.next_codes(ROOT / "rules")["W"] > "W209"
