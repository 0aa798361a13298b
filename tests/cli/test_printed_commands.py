"""Every command that doctor prints can be pasted, and does what is said beside it."""

import re
import shlex
import sys
from itertools import pairwise

import click
import pytest
from click.testing import CliRunner
from printed import texts

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import cli
from doctor.core.errors import DoctorError
from doctor.core.tables import table
from doctor.lint import explain
from doctor.lint.engine import load_rules
from doctor.report import presentation, verdict

RULES = load_rules()


def run(command):
    """The outcome of a command line as a shell would split it."""
    words = shlex.split(command)
    assert words[0] == "doctor"
    return CliRunner().invoke(cli, words[1:], standalone_mode=False)


def code_of(result):
    if isinstance(result.exception, SystemExit):
        return result.exception.code or 0
    if result.exception is not None:
        raise result.exception
    return 0


def bad(rule):
    return sys.modules[rule.module].bad()[0]


@pytest.fixture(scope="module", params=RULES, ids=lambda r: r.code)
def shown(request, tmp_path_factory):
    """(rule, its bad example on disk, what a plain check of it says)."""
    rule = request.param
    case = bad(rule)
    path = case.write(tmp_path_factory.mktemp(rule.code) / "model")
    try:
        return rule, path, check(path, case.recipe)
    except DoctorError as error:
        pytest.skip(f"check says it as an error: {error}")


def test_each_next_step_of_a_screen_does_what_it_says(shown, tmp_path, monkeypatch):
    """`fix` writes its output and what it said it fixes is gone; `quantize` writes; `explain` knows the code."""
    _rule, _path, report = shown
    if report.recipe.keep:
        pytest.skip("no option of check leaves linears out, so no screen is judged for such a recipe")
    monkeypatch.chdir(tmp_path)
    groups = presentation.groups(report)
    for number, (command, _what) in enumerate(verdict.next_steps(report, groups)):
        command = command.replace(" fixed/", f" fixed{number}/").replace(" quantized/", f" quantized{number}/")
        if command.startswith("doctor quantize"):
            command += " --rows 2 --max-seq-length 32"
        if "--download" in command:
            continue
        result = run(command)
        assert code_of(result) in (0, 1), (command, result.output)
        if command.startswith("doctor fix"):
            after = {f.code for f in check(tmp_path / f"fixed{number}", report.recipe).findings}
            safeties = {"safe", "unsafe"} if "--unsafe-fixes" in command else {"safe"}
            promised = {g.code for g in groups if g.safety in safeties and not g.of_recipe}
            assert promised and not promised & after, (command, result.output)
        elif command.startswith("doctor quantize"):
            assert Checkpoint.open(tmp_path / f"quantized{number}").value("config.json")["quantization_config"]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.code)
def test_the_command_that_decides_a_rule_runs_that_rule(rule, tmp_path):
    command = explain.decider(rule)
    if not command.startswith("doctor check"):
        return parses(command)
    path = bad(rule).write(tmp_path / "model")
    result = run(command.replace("CKPT", str(path)) + " -f json")
    assert code_of(result) in (0, 1), result.output
    assert rule.code in result.output


def parses(command):
    """The options of a command line exist; what stands for a value is not looked at."""
    words = shlex.split(command.replace("…", "").split(" 2>")[0].split(" | ")[0].split(" && ")[0])
    name = next((w for w in words[1:] if not w.startswith("-")), None)
    if name is None:
        return
    assert name in cli.commands, command
    target = cli.commands[name]
    flags = {flag for p in target.params for flag in (*p.opts, *p.secondary_opts)}
    flags |= {flag for p in target.params for flag in getattr(p, "aliases", ())}
    flags |= {flag for p in target.params for flag in getattr(p, "full_names", ())}
    for word in words[2:]:
        if re.match(r"--?[a-z]", word):
            flag = word.partition("=")[0]
            assert flag in flags | {"-h", "--help", "--unsafe-fixes"}, f"{command}: {flag}"
    for word, value in pairwise(words):
        option = next((p for p in target.params if word in p.opts), None)
        if option is not None and isinstance(option.type, click.Choice) and not value.isupper():
            assert value in option.type.choices, f"{command}: {value}"


@pytest.mark.parametrize(("where", "command"), list(texts()), ids=lambda text: text[:60])
def test_every_command_in_a_text_names_options_that_exist(where, command):
    parses(command)


def test_the_texts_are_found():
    assert len(list(texts())) > 60
    assert sum("`doctor " in e["do"] for e in table("readings")["reading"]) > 5
