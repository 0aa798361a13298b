"""Every command speaks Chinese with --lang zh: what is left in English is names, numbers, and what others wrote."""

import json
import re
import sys

import pytest
from click.testing import CliRunner

from doctor import api
from doctor.cli.main import cli
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES
from doctor.lint.testing import tiny
from doctor.locale import catalogue

load_rules()
PLAN = ("--group-size", "32")
# Four words of two letters or more in a row, as a sentence has them and a name or a list of names does not.
SENTENCE = re.compile(r"(?:\b[A-Za-z][a-z']+,? ){3}[a-z']+\b")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """good, bad and quantized checkpoints, and a text of ids."""
    folder = tmp_path_factory.mktemp("zh")
    good = tiny().write(folder / "good")
    broken = tiny()
    broken.down()[3, 5] = 0x7FC0
    text = folder / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"input_ids": [3 + (7 * i + j) % 90 for j in range(32)]}) + "\n" for i in range(4))
    )
    api.quantize(good, folder / "q", tiny().recipe, calibration=text, rows=2, max_seq_length=32)
    return {"good": good, "bad": broken.write(folder / "bad"), "q": folder / "q", "text": text, "new": folder}


def spoken(*args):
    """Everything a command prints, on both streams."""
    done = CliRunner(env={"COLUMNS": "120"}).invoke(cli, [str(a) for a in args])
    assert done.exit_code in (0, 1), done.output
    return done.output


def quoted(report):
    """What stands in English in a Chinese screen by intention: exact messages, notes on a place, and other tools'
    errors.
    """
    texts = [f.message for f in report.findings] + [f.where.note for f in report.findings]
    return [t for t in texts if t]


def english(text, others=()):
    """Sentences of English in a text, but for `others` and the errors that rules quote."""
    seen = [s.text for entry in RULES.values() for s in entry.seen_as]
    text = re.sub(r"\n\s+vllm serve .*", "", text)  # a command below another
    text = re.sub(r"\s*\n\s+", " ", text)  # lines that were wrapped are indented
    for other in sorted([*others, *seen], key=len, reverse=True):
        text = text.replace(" ".join(other.split()), "…")
    return [
        m[0]
        for line in text.splitlines()
        for m in SENTENCE.finditer(re.sub(r"""python -c '[^']*'|"[^"]*"|`[^`]*`""", "", line))
    ]


COMMANDS = {
    "check": lambda m: ("check", m["good"], "-v", "--matrix", *PLAN),
    "check --capacity": lambda m: ("check", m["good"], "-v", "--capacity", m["new"], "--runtime", "vllm", *PLAN),
    "check of a broken one": lambda m: ("check", m["bad"], "-v", *PLAN),
    "check of a quantized one": lambda m: ("check", m["q"], "-v", *PLAN),
    "check headers": lambda m: ("check", m["good"], "--stage", "header", "-v", *PLAN),
    "convert": lambda m: ("convert", m["q"], "-o", m["new"] / "bf16", "--format", "bf16"),
    "fix": lambda m: ("fix", m["bad"], "-o", m["new"] / "fixed", "--unsafe-fixes=W201", *PLAN),
    "fix --dry-run": lambda m: ("fix", m["bad"], "-o", m["new"] / "dry", "--dry-run", *PLAN),
    "quantize": lambda m: (
        "quantize",
        m["good"],
        "-o",
        m["new"] / "again",
        "--calibration",
        m["text"],
        "--rows",
        9,
        *PLAN,
    ),
    "quantize --plan": lambda m: ("quantize", m["good"], "-o", m["new"] / "none", "--plan", *PLAN),
    "quantize --preflight": lambda m: (
        "quantize",
        m["good"],
        "-o",
        m["new"] / "none",
        "--preflight",
        "--calibration",
        m["text"],
        *PLAN,
    ),
    "verify": lambda m: ("verify", m["good"], m["q"], "--text", m["text"], "--context", 32, "--rows", 2, "-v"),
    "advise": lambda m: ("advise", m["good"], "--memory", "1GB", "--gpu", "t4", "-v"),
    "advise what fits": lambda m: ("advise", m["good"], "--memory", "2GB"),
    "advise for llama.cpp": lambda m: ("advise", m["good"], "--memory", "2GB", "--runtime", "llama.cpp"),
    "kvcache": lambda m: ("kvcache", m["good"], "--measure", "--text", m["text"], "--memory", "1GB", "--k-bits", 5),
    "explain": lambda m: ("explain", "G302"),
    "explain an error": lambda m: ("explain", "Hessian is not invertible"),
    "rules": lambda m: ("rules",),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_no_sentence_in_english(name, models):
    others = quoted(api.check(models["bad"], tiny().recipe)) + quoted(api.check(models["q"], tiny().recipe))
    args = COMMANDS[name](models)
    text = spoken(*args, "--lang", "zh")
    if args[0] in ("verify", "quantize"):  # their findings are known only to themselves
        others += re.findall(r"\[[A-Z]\d{3}\] .*\n  (.*)$", text, re.M)
    assert not english(text, others)
    assert re.search("[一-鿿]{3}", text)


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_help_is_chinese_whole(name):
    args = [name, "--help"] if name else ["--help"]
    text = spoken("--lang", "zh", *args)
    usage = re.sub("^.*?\n  [^a-zA-Z]*doctor .*$", "", text)
    assert not english(re.sub("`[^`]*`|doctor .*", "", usage)) and "用法：" in text and "显示本帮助并退出" in text
    if name and any("--lang" in p.opts for p in cli.commands[name].params):
        assert spoken(name, "--help", "--lang", "zh") == spoken(name, "--lang=zh", "--help") == text


def test_help_follows_the_locale_and_lang_goes_before_it(monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert "用法：" in spoken("rules", "--help") and "用法：" in spoken("--help")
    assert "Usage:" in spoken("rules", "--help", "--lang", "en") and "Usage:" in spoken(
        "--lang", "en", "rules", "--help"
    )


def test_every_help_text_is_translated():
    commands = [cli, *cli.commands.values()]
    texts = [
        t
        for c in commands
        for t in (c.help, c.short_help, c.epilog, *(getattr(p, "help", None) for p in c.params))
        if t
    ]
    with catalogue.language("zh"):
        assert [t for t in texts if not re.search("[一-鿿]", catalogue.translated(t))] == []


def test_no_line_of_chinese_help_is_wider_than_the_screen():
    from rich.cells import cell_len

    done = CliRunner(env={"COLUMNS": "80"}).invoke(cli, ["quantize", "--help", "--lang", "zh"])
    assert [line for line in done.output.splitlines() if cell_len(line) > 80] == []


@pytest.mark.parametrize("code", sorted(RULES))
def test_what_a_rule_advises_stands_in_chinese(code, tmp_path):
    """Messages, notes, fixes, advice and heads of tables of every rule's example."""
    case, _ = sys.modules[RULES[code].module].bad()
    report = api.check(case.write(tmp_path), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()])
    said = {
        t
        for f in report.findings
        if f.code == code
        for t in (f.message, f.where.note, f.fix.title if f.fix else "", f.advice, *(row[0] for row in f.facts_table))
    }
    with catalogue.language("zh"):
        left = [
            t
            for t in said
            if re.search("[a-z]{2,} [a-z]{2,}", t) and not re.search("[\u4e00-\u9fff]", catalogue.translated(t))
        ]
    assert not left
