"""Completion as a shell asks for it: commands, options, rule codes, and paths."""

import os
import subprocess
import sys

import pytest

from doctor.cli import main as cli

MAIN = [sys.executable, "-m", "doctor"]


def asked(monkeypatch, capsys, line, word=None):
    """What bash gets for the last word of a line."""
    words = line.split(" ")
    monkeypatch.setenv("_DOCTOR_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
        raise SystemExit
    return [x.partition(",")[2] if x.startswith("plain") else x for x in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "line, wanted, unwanted",
    [
        ("doctor ch", ["check"], ["fix"]),
        ("doctor check --gr", ["--group-size"], ["--bits"]),
        ("doctor check --for ", ["gptq", "awq", "rtn"], ["W201"]),
        ("doctor check --select W20", ["W201", "W205"], ["G301"]),
        ("doctor check --ignore W201,G30", ["W201,G301", "W201,G302"], ["G301"]),
        ("doctor explain nonf", ["nonfinite-weight", "nonfinite-hessian"], ["W201"]),
        ("doctor fix m --only g3", ["G301"], ["W201"]),
        ("doctor convert m --format ", ["bf16", "f16", "gptq", "gptq_v2", "awq", "compressed-tensors"], ["fp8"]),
        ("doctor check mod", ["file,mod"], ["W201"]),
    ],
)
def test_what_a_shell_is_offered(monkeypatch, capsys, line, wanted, unwanted):
    offered = asked(monkeypatch, capsys, line)
    assert set(wanted) <= set(offered) and not set(unwanted) & set(offered)


@pytest.mark.parametrize(
    "shell, marks",
    [("bash", "complete -o nosort -F"), ("zsh", "#compdef doctor"), ("fish", "complete --no-files --command doctor")],
)
def test_the_script_of_each_shell_asks_this_command(shell, marks):
    script = subprocess.run([*MAIN, "completion", shell], capture_output=True, text=True, check=True).stdout
    assert marks in script and f"_DOCTOR_COMPLETE={shell}_complete" in script


def test_bash_itself_completes_a_code_with_the_script(tmp_path):
    command = tmp_path / "doctor"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m doctor "$@"\n')
    command.chmod(0o755)
    ask = (
        'eval "$(doctor completion bash)"\nCOMP_WORDS=(doctor check --select W20)\nCOMP_CWORD=3\n'
        '_doctor_completion doctor\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    run = subprocess.run(
        ["bash", "-c", ask],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    assert "W201" in run.stdout.split()
