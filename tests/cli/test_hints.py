"""Commands in hints of errors: run by a reader who was just shown the error, they find or mend what it was about."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner
from printed import record

from doctor.api import check
from doctor.cli.main import cli
from doctor.core.errors import DoctorError
from doctor.lint.testing import tiny, tiny_gguf, tiny_gptq


class Result(NamedTuple):
    output: str
    exit_code: int


def run(*words):
    result = CliRunner().invoke(cli, [str(w) for w in words])
    if isinstance(result.exception, DoctorError):  # of the configuration, which `main` prints
        return Result(str(result.exception), 2)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Result(result.output, result.exit_code)


def no_sizes(folder):
    case = tiny()
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"):
        case.config.pop(key, None)
    case.write(folder / "model")


def no_scales(folder):
    case = tiny_gptq()
    del case.tensors[f"{case.packed('down')}.scales"]
    case.write(folder / "model")
    tiny().write(folder / "original")


def cut_gguf(folder):
    tiny_gguf().write(folder / "gguf")
    [file] = (folder / "gguf").glob("*.gguf")
    (folder / "cut.gguf").write_bytes(file.read_bytes()[:3000])
    tiny().write(folder / "model")


def plain(folder):
    tiny().write(folder / "model")


def replaced(folder):
    """What `fix --in-place` leaves, and the same defect again."""
    case = tiny()
    case.config["bos_token_id"] = "1"
    case.write(folder / "model")
    run("fix", folder / "model", "--in-place", "--group-size", "32")
    case.write(folder / "model")


def no_report(folder):
    tiny().write(folder / "model")
    (folder / "doctor.json").write_text("no JSON")
    (folder / "kv.json").write_text(json.dumps({"schema": "doctor.kv/0"}))


def wrong_key(folder):
    tiny().write(folder / "model")
    (folder / "own.toml").write_text('ignroe = ["C110"]\n')


# prepare, the command that fails, the command that its hint prints, the words for it here, and what these must say.
SITUATIONS = [
    (no_sizes, "kvcache model", "doctor check", "check model", "C14"),
    (no_scales, "convert model -o out --format awq", "doctor check", "check model", "O612"),
    (no_scales, "tune model --to original -o out", "doctor check", "check model", "O612"),
    (cut_gguf, "verify model cut.gguf", "doctor check", "check cut.gguf", "F071"),
    (plain, "convert model -o out --format awq", "doctor quantize", "quantize model -o out --help", "calibration"),
    (plain, "check model --select X999", "doctor rules", "rules", "W201"),
    (
        replaced,
        "fix model --in-place --group-size 32",
        "doctor undo MODEL",
        "undo model",
        "model",
    ),
    (
        no_report,
        "render doctor.json",
        "doctor check CHECKPOINT -f json:doctor.json",
        "check model -f json:doctor.json",
        "",
    ),
    (
        wrong_key,
        "check model --config own.toml",
        "doctor check --show-settings",
        "check --show-settings",
        "extend-select",
    ),
]


@pytest.mark.parametrize(
    ("prepare", "fails", "printed", "follow", "says"), SITUATIONS, ids=[f"{s[0].__name__}: {s[1]}" for s in SITUATIONS]
)
def test_the_command_of_a_hint_answers_the_error(prepare, fails, printed, follow, says, tmp_path, monkeypatch, request):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    error = run(*shlex.split(fails))
    assert error.exit_code in (1, 2), error.output
    commands = re.findall(r"`(doctor [a-z][^`]*)`", error.output)
    wanted = printed.replace("MODEL", str(tmp_path / "model"))
    assert wanted in commands, error.output
    answer = run(*shlex.split(follow))
    assert answer.exit_code in (0, 1) and says in answer.output, answer.output
    record(request.node.user_properties, printed, f"hint of `doctor {fails.split()[0]}`", "run")


def test_the_report_that_a_hint_asks_for_can_be_rendered(tmp_path, monkeypatch):
    no_report(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("check", "model", "-f", "json:doctor.json").exit_code in (0, 1)
    assert "G301" in run("render", "doctor.json").output


def test_undo_of_a_hint_makes_room_for_another_fix(tmp_path, monkeypatch):
    replaced(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("undo", "model").exit_code == 0 and not Path("model.before-fix").exists()
    assert run("fix", "model", "--in-place", "--group-size", "32").exit_code == 0
    assert "C106" not in {f.code for f in check("model").findings}


@pytest.mark.parametrize("command", ["tune model --to model -o out", "convert model -o out --format awq"])
def test_what_is_not_quantized_is_refused_before_any_work(command, tmp_path, monkeypatch):
    plain(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = run(*command.split())
    assert result.exit_code == 2 and "original on" not in result.output and not Path("out").exists()
