"""Whose configuration is believed: the user's, never that of who made the files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from doctor.core.errors import DoctorError
from doctor.lint import config, trust
from doctor.lint.testing import tiny

BLIND = 'fail-on = "never"\nignore = ["W"]\n[[suppress]]\ncode = "W201"\nreason = "fine"\n'
EVIL = 'open("ran", "w").write("ran")\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working directory in no project, with an empty configuration directory of the user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def spoilt(folder: Path) -> Path:
    """A checkpoint with a NaN."""
    case = tiny()
    case.down()[0, 0] = 0x7FC0
    case.write(folder)
    return folder


def git(folder: Path) -> None:
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


def run(capsys, *arguments):
    from doctor.cli.main import main

    try:
        main(list(arguments))
        code = 0
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def in_a_download(home: Path) -> Path:
    """doctor.toml above the weights, as snapshot_download of a repository with a directory `fp16` leaves it."""
    spoilt(home / "fp16")
    return home


def in_the_checkpoint(home: Path) -> Path:
    return spoilt(home / "ck")


def in_a_clone_of_the_hub(home: Path) -> Path:
    git(home)
    (home / ".git" / "config").write_text('[remote "origin"]\n\turl = https://huggingface.co/org/model\n')
    spoilt(home / "fp16")
    return home


def in_a_repository_of_lfs_weights(home: Path) -> Path:
    git(home)
    (home / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    spoilt(home / "fp16")
    return home


def in_a_local_download_with_git(home: Path) -> Path:
    git(home)
    (home / ".cache" / "huggingface").mkdir(parents=True)
    spoilt(home / "fp16")
    return home


def below_a_checkpoint(home: Path) -> Path:
    git(home)
    spoilt(home / "ck")
    (home / "ck" / "inner").mkdir()
    return home / "ck" / "inner"


def in_a_git_directory_that_is_empty(home: Path) -> Path:
    (home / ".git").mkdir()
    spoilt(home / "fp16")
    return home


PLACES = (
    in_a_download,
    in_the_checkpoint,
    in_a_clone_of_the_hub,
    in_a_repository_of_lfs_weights,
    in_a_local_download_with_git,
    below_a_checkpoint,
    in_a_git_directory_that_is_empty,
)


@pytest.mark.parametrize("name", ("doctor.toml", "pyproject.toml"))
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__)
def test_files_that_came_along_decide_nothing_and_run_nothing(home, monkeypatch, capsys, place, name):
    folder = place(home)
    (folder / "rules").mkdir()
    (folder / "rules" / "w999_evil.py").write_text(EVIL)
    text = 'rules = ["rules"]\n' + BLIND
    if name == "pyproject.toml":
        text = "[tool.doctor]\n" + text.replace("[[suppress]]", "[[tool.doctor.suppress]]")
    (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    (weights,) = [p.parent for p in [*folder.rglob("config.json"), *folder.parent.rglob("config.json")][:1]]
    code, out, err = run(capsys, "check", str(weights), "--group-size", "32", "--concise")
    assert code == 1 and "W201" in out, (code, out, err)
    assert not (folder / "ran").exists()
    assert err.count("Not followed: ") == 1 and name in err and "`doctor trust FILE`" in err


def test_what_is_malformed_and_not_believed_is_no_error(home, capsys):
    spoilt(home / "fp16")
    (home / "doctor.toml").write_text("a = " + "[" * 5000)
    (home / "pyproject.toml").write_text("[tool.doctor\n")
    code, _out, err = run(capsys, "check", "fp16", "--group-size", "32", "--concise")
    assert code == 1 and "Not followed: doctor.toml: it is in no project of yours" in err


def test_a_file_that_is_named_or_lies_in_the_users_own_directory_counts(home, capsys, monkeypatch):
    spoilt(home / "fp16")
    (home / "doctor.toml").write_text(BLIND)
    assert run(capsys, "check", "fp16", "--group-size", "32", "--config", "doctor.toml")[0] == 0
    monkeypatch.setenv("DOCTOR_CONFIG", "doctor.toml")
    assert run(capsys, "check", "fp16", "--group-size", "32")[0] == 0
    monkeypatch.delenv("DOCTOR_CONFIG")
    trust.user_folder().mkdir(parents=True)
    (home / "doctor.toml").rename(trust.user_folder() / "doctor.toml")
    code, _out, err = run(capsys, "check", "fp16", "--group-size", "32")
    assert code == 0 and not err.count("Not followed")


def test_a_project_decides_and_its_python_runs_only_after_doctor_trust(home, capsys):
    git(home)
    spoilt(home / "fp16")
    (home / "rules").mkdir()
    (home / "rules" / "w998_own_trusted.py").write_text(EVIL)
    (home / "doctor.toml").write_text('rules = ["rules"]\nignore = ["W"]\n')
    code, out, err = run(capsys, "check", "fp16", "--group-size", "32", "--concise")
    assert code == 0 and "W201" not in out and not (home / "ran").exists()
    assert "Not followed: the Python rule files that doctor.toml names." in err
    code, _out, err = run(capsys, "trust", "doctor.toml")
    assert code == 0 and "doctor.toml: trusted until it changes. It sets ignore and rules." in err.replace(
        "rules and ignore", "ignore and rules"
    )
    assert not (home / "ran").exists()
    run(capsys, "check", "fp16", "--group-size", "32", "--concise")
    assert (home / "ran").exists()
    (home / "ran").unlink()
    (home / "rules" / "w998_own_trusted.py").write_text(EVIL + "# another\n")
    assert trust.doubt(home / "doctor.toml") is None and not trust.is_allowed(home / "doctor.toml")
    sys.modules.pop("doctor_extra_rules.w998_own_trusted")
    run(capsys, "check", "fp16", "--group-size", "32", "--concise")
    assert not (home / "ran").exists()


def test_trust_is_taken_back_by_a_change_and_by_forget(home, capsys):
    file = home / "doctor.toml"
    file.write_text(BLIND)
    assert config.load(home).file is None
    assert run(capsys, "trust", "doctor.toml")[0] == 0 and config.load(home).file == file
    file.write_text(BLIND + "\n")
    assert config.load(home).file is None
    run(capsys, "trust", "doctor.toml")
    assert config.load(home).file == file
    assert "no longer trusted" in run(capsys, "trust", "--forget", "doctor.toml")[2]
    assert config.load(home).file is None
    assert "was not trusted" in run(capsys, "trust", "--forget", "doctor.toml")[2]


@pytest.mark.parametrize("text", ("", "[]", '{"x": 1}', "nonsense", "[" * 100_000))
def test_a_damaged_list_of_trusted_files_trusts_nothing(home, text):
    (home / "doctor.toml").write_text(BLIND)
    trust.user_folder().mkdir(parents=True)
    (trust.user_folder() / trust.ALLOWED).write_text(text)
    assert not trust.is_allowed(home / "doctor.toml")


def test_a_pipe_or_device_is_no_configuration(home, capsys):
    os.mkfifo(home / "doctor.toml")
    with pytest.raises(DoctorError, match="not a regular file"):
        config.read(home / "doctor.toml")
    with pytest.raises(DoctorError, match="not a regular file"):
        config.read(Path("/dev/zero"))
    assert run(capsys, "trust", "doctor.toml")[0] == 2 and run(capsys, "trust", "absent.toml")[0] == 2


def test_python_m_doctor_imports_nothing_from_the_checkpoint_it_stands_in(home):
    """Every module of the standard library and every one that doctor needs lies in the checkpoint, as a trap."""
    folder = spoilt(home / "ck")
    names = {"torch", "transformers", "click", "numpy", "safetensors", "rich", "tokenizers", "jinja2", "rules"}
    for name in (set(sys.stdlib_module_names) | names) - {"__main__", "builtins", "sys"}:
        (folder / f"{name}.py").write_text('open("ran", "a").write(__name__)\nraise SystemExit(77)\n')
    command = [sys.executable, "-m", "doctor", "check", ".", "--group-size", "32", "--concise", "--matrix"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "W201" in done.stdout, done.stderr
    assert not (folder / "ran").exists(), (folder / "ran").read_text()
