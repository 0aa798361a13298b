"""Help pages and small truths of the command line: headings, examples, defaults, near names, several checkpoints."""

import json
import re
import shlex

import click
import pytest

from doctor.cli import main as cli
from doctor.cli.groups import EXAMPLES, FEW, GROUPS, grouped
from doctor.lint.testing import tiny

COMMANDS = list(cli.cli.commands)


@pytest.fixture
def run(capsys, plain_environment):
    """Run `doctor ARGS`: (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return call


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_shows_every_option_once_under_a_heading_and_an_example(run, name):
    command = cli.cli.commands[name]
    page = run(name, "--help")[1]
    assert "\nExamples:\n" in page and all(line in page and what in page for line, what in EXAMPLES[name])
    options = [p for p in command.get_params(click.Context(command)) if isinstance(p, click.Option)]
    assert sorted(p.name for _heading, members in grouped(options) for p in members) == sorted(p.name for p in options)
    assert ("\nRecipe:\n" in page) == (len(options) > FEW and any(p.name == "bits" for p in options))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_understood(name):
    for call, _what in EXAMPLES[name]:
        words = shlex.split(call[call.index("doctor ") :].removesuffix(')"'))
        assert words[1] == name
        cli.cli.commands[name].make_context(name, words[2:], resilient_parsing=True)


def test_every_name_of_a_group_is_an_option_of_some_command():
    known = {p.name for command in cli.cli.commands.values() for p in command.params}
    assert {name for _heading, names in GROUPS for name in names.split()} <= known


def test_defaults_that_are_said_are_the_defaults():
    from doctor.quant.calibration.rows import MAX_SEQ_LENGTH, ROWS

    page = {p.name: p.help for p in cli.cli.commands["quantize"].params if isinstance(p, click.Option)}
    assert f"[default: {ROWS}]" in page["rows"] and f"[default: {MAX_SEQ_LENGTH}]" in page["max_seq_length"]
    assert all(page[p.name] for p in cli.cli.commands["quantize"].params if isinstance(p, click.Option))


@pytest.mark.parametrize(
    "args, near",
    [
        (("check", "m", "--runtime", "vlm"), "Did you mean vllm?"),
        (("check", "m", "--for", "gptqq"), "Did you mean gptq?"),
        (("check", "m", "-f", "markdwn"), "Did you mean markdown?"),
        (("rules", "--select", "nonfinite-weights"), "Did you mean nonfinite-weight"),
        (("explain", "W299"), "Did you mean W2"),
        (("advise", "m", "--gpu", "h10"), "Did you mean h100"),
    ],
)
def test_a_word_that_is_none_is_answered_with_the_nearest(run, args, near):
    code, _out, err = run(*args)
    assert code == 2 and near in err, err


def test_one_wrong_path_does_not_hide_the_others(run, tmp_path):
    good = tiny("llama").write(tmp_path / "good")
    code, out, err = run("check", tmp_path / "a", good, tmp_path / "b", "--group-size", "32", "--stage", "header")
    assert code == 2 and "✓ ready" in out
    assert f"{tmp_path}/a: " in err and f"{tmp_path}/b: " in err


def test_a_plan_is_wrapped_and_has_a_json(run, tmp_path, monkeypatch):
    good = tiny("llama").write(tmp_path / "good")
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _err = run("quantize", good, "-o", tmp_path / "q", "--plan", "--group-size", "32")
    assert code == 0 and max(map(len, out.splitlines())) <= 60 and out.startswith("memory  ")
    assert all(
        line.startswith(("memory  ", "GPU     ", "disk    ", "time    ", "        ")) for line in out.splitlines()
    )
    code, out, _err = run("quantize", good, "-o", tmp_path / "q", "--plan", "--group-size", "32", "--report", "json")
    assert code == 0 and json.loads(out)["schema"] == "doctor.plan/1" and json.loads(out)["peak"] > 0


def test_md_is_short_for_markdown(run, tmp_path):
    good = tiny("llama").write(tmp_path / "good")
    code, out, _err = run("check", good, "--group-size", "32", "--stage", "header", "-f", "md")
    assert code == 0 and out.startswith("<!-- doctor:good -->")


def test_what_quantize_writes_can_be_rendered_and_a_preflight_is_called_one(run, tmp_path):
    good = tiny("llama").write(tmp_path / "good")
    args = ("quantize", good, "-o", tmp_path / "q", "--for", "rtn", "--group-size", "32")
    code, out, _err = run(*args, "--preflight")
    assert "2 layers tried, nothing written: rtn 4-bit g32" in out and "quantized to" not in out
    code, out, err = run(*args)
    assert code == 0 and "doctor verify" in out and "bits a weight" in out, err
    code, out, _err = run("render", tmp_path / "q" / "doctor.json")
    assert code == 0 and "quantized to rtn 4-bit g32, by its receipt" in out and "14 rtn" in out
    code, out, _err = run("render", tmp_path / "q" / "doctor.json", "-f", "html")
    assert code == 0 and "by its receipt" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (("quantize", "model"), "错误：缺少选项 '-o' / '--output'。"),
        (("trust",), "错误：缺少参数 'FILE...'。"),
        (("check", "model", "--bits", "x"), "错误：'--bits' 的值无效：须是整数。"),
        (("check", "model", "--damp-maxx", "1"), "错误：没有这个选项：--damp-maxx。"),
        (("check", "model", "-f", "jsn"), "错误：'-f' 的值无效：'jsn' 不在"),
        (("chek",), "错误：没有这个命令：chek。"),
        (("quantize", "model", "-o", "out", "--retry-failed"), "错误：--retry-failed 要与 --resume 一起用。"),
        (("advise", "model", "--memory", "24"), "错误：'--memory' 的值无效：'24' 是字节数；须带单位，例如 24GB。"),
    ],
)
def test_an_error_of_usage_is_in_the_language_of_the_reader(run, words, said):
    code, out, err = run("--lang", "zh", *words)
    assert code == 2 and not out and said in err
    assert not re.search(r"Usage|Error|Try|Hint|must|Missing", err)


def test_facts_and_examples_are_in_the_language_of_the_reader(run):
    assert "config.json，作为 dict。" in run("facts", "config", "--lang", "zh")[1]
    assert "事实" in run("facts", "作为", "--lang", "zh", "-f", "markdown")[1]
    assert json.loads(run("facts", "config", "--lang", "zh", "-f", "json")[1])[0]["doc"].startswith("The text")
    assert "什么也不下载" in run("advise", "--help", "--lang", "zh")[1].splitlines()[-4]
