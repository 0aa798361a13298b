"""The schema of doctor.toml takes what the reader takes and refuses what it refuses."""

import json
import re
import tomllib
from datetime import date
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from doctor.cli.main import cli
from doctor.core.errors import DoctorError
from doctor.lint.config import read
from doctor.lint.config_schema import FILE, config_schema, config_schema_text

ROOT = Path(__file__).parents[2]
KEYS = re.compile(
    r"^(\[recipe\]|\[tool\.doctor|\[\[suppress\]\]|(select|ignore|fail-on|rules|extend-select)\s*=)", re.M
)


def plain(value):
    """As JSON has it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value


def examples():
    """(page, text) of each configuration in the docs."""
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("doctor/locale/zh/*.md")]
    for page in sorted(pages):
        for text in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            if KEYS.search(text) and "[[recipe]]" not in text:
                yield page.name, text


def accepts(text):
    table = tomllib.loads(text)
    table = table["tool"]["doctor"] if "tool" in table else table
    return jsonschema.Draft202012Validator(config_schema()).is_valid(plain(table))


def test_it_is_a_schema_and_the_package_holds_it():
    jsonschema.Draft202012Validator.check_schema(config_schema())
    shipped = files("doctor.report.formats").joinpath(FILE).read_text(encoding="utf-8")
    assert shipped == config_schema_text(), "make docs writes it"


def test_every_example_of_the_docs_is_valid():
    found = list(examples())
    assert any(page == "configuration.md" for page, _text in found)
    for page, text in found:
        assert accepts(text), page


@pytest.mark.parametrize(
    "text",
    [
        "", 'fail-on = "never"', 'fail_on = "warning"', "[recipe]\ngroup_size = -1",
        "[recipe]\ngroup-size = 64\ntp = 2",
        '[recipe]\nruntime = "vllm==0.9"', '[recipe]\nruntime = "llama.cpp"', '[recipe]\nmethod = "awq"\nsym = false',
        "[recipe]\ndamp = 0", '[recipe]\nkeep = ["*.down_proj"]', '[[suppress]]\ncode = "W204"\nreason = "known"',
        'fail-on = "fatal"', "select = 3", 'selct = ["F"]', "[recipe]\nbits = 'four'", '[recipe]\nmethod = "gtpq"',
        "[recipe]\ntp = 0", '[recipe]\nruntime = "vlm"', "[recipe]\ndamp = 2.0", "[recipe]\nsym = 1",
        '[[suppress]]\ncode = "W204"', '[[suppress]]\ncode = " "\nreason = "x"', '[recipe]\nformat = "zip"',
        '[[suppress]]\ncode = "W204"\nreason = "x"\nsha256 = "12"', "[suppress]\n", '[recipe]\ngoal = "all"',
    ],
)  # fmt: skip
def test_schema_and_reader_agree(text, tmp_path):
    file = tmp_path / "doctor.toml"
    file.write_text(text)
    try:
        read(file)
        taken = True
    except DoctorError:
        taken = False
    assert accepts(text) is taken


def test_the_command_prints_both_schemas():
    for name, title in (("config", "doctor.toml"), ("report", "")):
        done = CliRunner().invoke(cli, ["rules", "--schema", name])
        assert done.exit_code == 0 and title in json.loads(done.output).get("title", "")
