"""What a person watches while a run goes on, and what a log gets."""

import io
import json

import click
from click.testing import CliRunner

from doctor.cli import progress
from doctor.cli.command import Command
from doctor.cli.main import cli
from doctor.cli.options import progress_option
from doctor.cli.output import notice
from doctor.core.messages import _, plural


def line(i, count, n=7):
    done = plural(
        "layer {i} of {count}: {n} linear in {seconds:.1f} s",
        "layer {i} of {count}: {n} linears in {seconds:.1f} s",
        n,
        i=i,
        count=count,
        seconds=1.0,
    )
    return _("{done}, about {clock} left", done=done, clock="9 s")


def test_a_log_gets_every_line_as_it_is():
    said = []
    with progress.run_lines(said.append) as show:
        show("check before: 0 errors")
        show(line(1, 2))
    assert said == ["check before: 0 errors", "layer 1 of 2: 7 linears in 1.0 s, about 9 s left"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_of_layers_with_linears_and_only_lines_that_name_something(monkeypatch):
    terminal, said = Terminal(), []
    monkeypatch.setattr("sys.stderr", terminal)
    for name in ("CI", "TERM", "HF_HUB_DISABLE_PROGRESS_BARS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with progress.run_lines(said.append) as show:
        show("check before: 0 errors")
        for i in range(1, 4):
            show(line(i, 3))
        show(_("{done}; damp raised: {names}", done=line(3, 3), names="mlp.down_proj"))
    assert [str(text)[:12] for text in said] == ["check before", "layer 3 of 3"]
    assert "28 linears" in terminal.getvalue() and "3/3" in terminal.getvalue()


def in_mode(mode, work):
    """What `work` writes on stderr in a command with this --progress."""

    @click.command(cls=Command)
    @progress_option
    def run():
        work()

    result = CliRunner().invoke(run, ["--progress", mode] if mode else [])
    assert result.exception is None, result.exception
    return result.stderr


def steps_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_json_has_one_object_a_line_with_the_same_keys_whatever_is_counted():
    def work():
        with progress.byte_bars(2000, "scan", "write") as tick:
            tick("scan", 500)
            tick("scan", 1500)
            tick("write", 700)
            tick("else", 1)
        with progress.layer_bars() as tick:
            tick("compare", 1, 2)
            tick("reply", 2, 2)
        with progress.run_lines(notice) as show:
            show("check before: 0 errors")
            show(line(1, 3))
            show(_("{done}; damp raised: {names}", done=line(3, 3), names="mlp.down_proj"))
            show(_("tune: step {step} of {steps}, KL {kl:.4f}", step=1, steps=4, kl=0.5))
            show(_("{phase}: {done} of {total}", phase="compare", done=1, total=1))

    told = steps_of(in_mode("json", work))
    assert [(s["step"], s.get("done"), s.get("total"), s.get("unit")) for s in told] == [
        ("scan", 500, 2000, "bytes"),
        ("scan", 2000, 2000, "bytes"),
        ("write", 700, 2000, "bytes"),
        ("write", 700, 700, "bytes"),
        ("compare", 1, 2, "layers"),
        ("reply", 2, 2, "tokens"),
        ("note", None, None, None),
        ("quantize", 1, 3, "layers"),
        ("quantize", 3, 3, "layers"),
        ("tune", 1, 4, "steps"),
        ("compare", 1, 1, "layers"),
    ]
    keys = {"step", "done", "total", "unit", "seconds", "left"}
    assert all(s.keys() == (keys if s["step"] != "note" else {"step", "text", "seconds"}) for s in told)
    assert all(s["seconds"] >= 0 and (s.get("left") or 0) >= 0 for s in told)
    assert told[0]["seconds"] == 0 and told[0]["left"] is None  # what was before the first bytes is no measure of them


def test_after_the_last_byte_a_bar_without_an_end_says_that_it_goes_on(monkeypatch):
    for name in ("CI", "TERM", "HF_HUB_DISABLE_PROGRESS_BARS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for last, said in ((0, False), (1, True)):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        with progress.byte_bars(progress.SHORT, "scan") as tick:
            tick("scan", progress.SHORT - 1)
            tick("scan", last)
        assert "scan" in terminal.getvalue() and ("judging" in terminal.getvalue()) == said


def test_off_is_silent_and_lines_say_each_phase():
    def work():
        with progress.layer_bars() as tick:
            for i in range(3):
                tick("compare", i + 1, 3)
        with progress.run_lines(notice) as show:
            show(line(1, 3))
            show(_("{phase}: {done} of {total}", phase="score", done=2, total=2))

    assert in_mode("off", work) == ""
    assert in_mode("", work) == "layer 1 of 3: 7 linears in 1.0 s, about 9 s left\n"
    said = in_mode("lines", work).splitlines()
    assert [text.partition(" in ")[0].partition(",")[0] for text in said] == [
        "compare: 1 of 3",
        "compare: 3 of 3",
        "layer 1 of 3: 7 linears",
        "score: 2 of 2",
    ]


def test_every_command_that_computes_takes_it_and_an_error_is_an_object_too(tmp_path):
    for name in ("check", "fix", "quantize", "tune", "verify", "kvcache"):
        assert "--progress" in CliRunner().invoke(cli, [name, "--help"]).output
    result = CliRunner().invoke(cli, ["fix", str(tmp_path / "none"), "-o", str(tmp_path / "o"), "--progress", "json"])
    (told,) = steps_of(result.stderr)
    assert result.exit_code == 2 and told["step"] == "error" and "No such file" in told["text"] and told["hint"]
