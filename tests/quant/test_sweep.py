"""Several recipes tried on a few layers: a row each, also for one that is refused, and nothing is written."""

import json
import math
import random

import pytest
from click.testing import CliRunner

from doctor.cli.main import cli
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.lint.recipe_list import read_recipes
from doctor.lint.testing import tiny

LIST = """
[[recipe]]
group_size = 32

[[recipe]]
name = "eight"
bits = 8
group-size = 32

[[recipe]]
method = "rtn"
group_size = 32

[[recipe]]
name = "indivisible"
group_size = 48
"""


@pytest.fixture
def flags(tmp_path):
    rng = random.Random(0)
    rows = ({"input_ids": [1] + [rng.randrange(3, 96) for _ in range(47)]} for _ in range(32))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "list.toml").write_text(LIST)
    tiny("llama").write(tmp_path / "m")
    text = ["--calibration", str(tmp_path / "rows.jsonl"), "--max-seq-length", "48", "--config", "none"]
    return ["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "o"), *text]


def test_each_recipe_has_its_row_and_a_refused_one_its_reason(flags, tmp_path):
    more = ["--preflight", "--recipes", str(tmp_path / "list.toml"), "-f", "full", "-f", f"json:{tmp_path / 's.json'}"]
    done = CliRunner().invoke(cli, [*flags, *more, "-f", f"html:{tmp_path / 's.html'}"])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "s.json").read_text())
    four, eight, rtn, refused = data["trials"]
    assert data["schema"] == "doctor.sweep/1" and [t["name"] for t in data["trials"]][1::2] == ["eight", "indivisible"]
    assert 0 < eight["error"] < four["error"] < rtn["error"] < 0.05 and rtn["calibrated"] is False
    assert eight["bytes"] > four["bytes"] > 0 and eight["bits"] > four["bits"] and four["seconds"] > 0
    assert "not divisible" in refused["problem"] or "48" in refused["problem"]
    assert "least error: eight" in done.output and "indivisible would fail: " in done.output
    assert "of the weights alone" in done.output and not (tmp_path / "o").exists()
    assert (tmp_path / "s.html").read_text().startswith("<!DOCTYPE html>")


def test_where_every_recipe_would_fail_it_ends_with_1(flags, tmp_path):
    (tmp_path / "list.json").write_text('[{"group_size": 48}, {"group_size": 56}]')
    done = CliRunner().invoke(cli, [*flags, "--preflight", "--recipes", str(tmp_path / "list.json")])
    assert done.exit_code == 1 and "every recipe would fail" in done.output


def test_it_goes_with_preflight_alone_and_text_is_looked_at_first(flags, tmp_path):
    done = CliRunner().invoke(cli, [*flags, "--recipes", str(tmp_path / "list.toml")])
    assert done.exit_code == 2 and "--recipes goes with --preflight" in done.output
    wrong = [*flags, "--preflight", "--recipes", str(tmp_path / "list.toml"), "--calibration", "none.md"]
    done = CliRunner().invoke(cli, wrong)
    assert done.exit_code == 2 and "none.md" in done.output and "recipe" not in done.stdout


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("l.toml", "[[recipe]]\nbits = 'four'", r"l.toml: recipe 1: bits is a string \(four\); must be a whole number"),
        (
            "l.json",
            '[{"bits": 4}, {"group-sise": 3}]',
            r"l.json: recipe 2: unknown key group_sise. Did you mean group_size",
        ),
        ("l.toml", "[[recipe]]\nbits = 4\n[[recipe]]\nbits = 4", "two recipes are called gptq 4-bit g128"),
        ("l.toml", "[[recipe]]\nscheme = 'W4A17'", "l.toml: recipe 1: scheme 'W4A17' is not known"),
        ("l.toml", "[recipe]\nbits = 4", "l.toml: holds no list of recipes"),
        ("l.json", "[]", "holds no list of recipes"),
        ("l.json", "{", "l.json: not JSON"),
        ("l.toml", "[[", "l.toml: not TOML"),
        ("none.toml", None, "No such file"),
    ],
)
def test_a_wrong_list_is_said_with_the_entry(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DoctorError, match=message):
        read_recipes(tmp_path / name, Recipe())


def test_what_an_entry_does_not_say_is_the_commands(tmp_path):
    (tmp_path / "l.toml").write_text(
        '[[recipe]]\nbits = 8\n[[recipe]]\nmethod = "awq"\n[[recipe]]\nscheme = "fp8_dynamic"\n'
    )
    eight, awq, fp8 = read_recipes(tmp_path / "l.toml", Recipe(group_size=64, damp=0.02))
    assert (eight.recipe.bits, eight.recipe.group_size, eight.recipe.damp) == (8, 64, 0.02)
    assert awq.recipe.method == "awq" and awq.recipe.output_format == "awq" and awq.recipe.sym is False
    assert fp8.name == "fp8_dynamic" and fp8.recipe.bits == 8 and fp8.recipe.activations
    assert not math.isnan(fp8.recipe.damp)
