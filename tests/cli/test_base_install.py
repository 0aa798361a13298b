"""A base installation has none of the extra `quantize`, no torch above all: what it does, it does without."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from doctor.cli.failures import OF_EXTRA
from doctor.lint.testing import tiny, tiny_gptq

ROOT = Path(__file__).parents[2]
WITHOUT = """
import importlib.metadata as metadata, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
ABSENT = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Absent())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in ABSENT else real(name, package)
from doctor.cli.main import main
main(sys.argv[2:])
"""


def doctor(*args):
    command = [sys.executable, "-c", WITHOUT, ",".join(OF_EXTRA), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def model(tmp_path):
    return tiny("llama").write(tmp_path / "m")


def test_check_fix_advise_explain_and_reports_need_none_of_the_extra(model, tmp_path):
    report = tmp_path / "r.json"
    run = doctor(
        "check", model, "--group-size", "32", "-f", "full", "-f", f"json:{report}", "-f", f"html:{tmp_path}/r.html"
    )
    assert run.returncode == 0 and "every byte read" in run.stdout, run.stderr
    assert doctor("render", report, "-f", "markdown").returncode == 0
    assert doctor("explain", "G302").returncode == 0 and doctor("rules").returncode == 0
    run = doctor("advise", model, "--memory", "24GB")
    assert run.returncode == 0 and "vllm serve" in run.stdout, run.stderr
    case = tiny("llama")
    case.down()[3, 5] = 0x7FC0
    run = doctor(
        "fix", case.write(tmp_path / "nan"), "-o", tmp_path / "fixed", "--unsafe-fixes=W201", "--group-size", "32"
    )
    assert run.returncode == 0 and (tmp_path / "fixed").is_dir(), run.stderr


@pytest.mark.parametrize(
    "command, args",
    [
        ("quantize", ("{m}", "-o", "{out}", "--group-size", "32")),
        ("quantize", ("{m}", "-o", "{out}", "--group-size", "32", "--plan")),
        ("verify", ("{m}", "{m}")),
        ("kvcache", ("{m}",)),
        ("tune", ("{q}", "--to", "{m}", "-o", "{out}")),
    ],
)
def test_what_is_missing_is_one_line_with_the_command(command, args, model, tmp_path):
    places = {"m": model, "q": tiny_gptq().write(tmp_path / "q"), "out": tmp_path / "out"}
    run = doctor(command, *(arg.format(**places) for arg in args))
    assert run.returncode == 2 and "is not installed, and this needs it." in run.stderr, run.stderr
    assert "pip install 'checkpoint-doctor[quantize]'" in run.stderr and "defect" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_the_base_and_its_extra_are_what_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {d.partition(">")[0].lower() for d in project["dependencies"]}
    extra = {d.partition(">")[0].lower() for d in project["optional-dependencies"]["quantize"]}
    assert named == {"click", "huggingface_hub", "jinja2", "numpy", "packaging", "regex", "rich"}
    assert extra == {"pyyaml" if name == "yaml" else name for name in OF_EXTRA}
    for name in ("demo", "test", "vision", "nvrtc"):  # what the README's commands install computes with models
        assert "checkpoint-doctor[quantize]" in project["optional-dependencies"][name]


def test_the_hook_and_the_action_call_options_that_exist():
    import yaml

    from doctor.cli.check import command

    known = {option for parameter in command.params for option in parameter.opts}
    hook = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
    assert hook["language"] == "python" and hook["entry"].startswith("doctor check ") and not hook["pass_filenames"]
    assert {word for word in hook["entry"].split() if word.startswith("--")} <= known
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    script = action["runs"]["steps"][-1]["run"]
    assert 'doctor" check' in script and "${{" not in script  # inputs come as variables: no text of theirs is run


def test_a_pure_wheel_says_that_it_reads_slowly_and_nobody_else_does(model, monkeypatch, capsys):
    from doctor.cli import check
    from doctor.cli import main as cli
    from doctor.scan import native

    def said(*args):
        check.say_slow.cache_clear()
        with pytest.raises(SystemExit):
            cli.main(["check", str(model), "--group-size", "32", *args])
            raise SystemExit(0)
        return capsys.readouterr().err

    assert "NumPy" not in said()
    monkeypatch.setattr(native, "level", lambda: None)
    assert "several times slower" in said() and "NumPy" not in said("--stage", "header")
    monkeypatch.setenv("DOCTOR_NATIVE", "0")
    assert "NumPy" not in said()
