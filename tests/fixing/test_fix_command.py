"""`doctor fix` and `doctor undo` on the command line."""

import json
import os
import sys

import pytest
from fix_cases import adapter, quantized

from doctor.api import fix
from doctor.checkpoint.directory import Checkpoint
from doctor.lint.rule import RULES
from doctor.lint.testing import tiny


@pytest.fixture
def doctor(capsys):
    """Run `doctor ARGS`: (exit code, stdout, stderr)."""
    from doctor.cli import main as cli

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)
        return end.value.code, *capsys.readouterr()

    return call


PLAN = ("--group-size", "32", "--config", "none")


def test_fix_takes_from_a_directory_and_check_fix_reports_on_the_copy(tmp_path, doctor):
    case = tiny()
    base = case.write(tmp_path / "base")
    case.down()[3, 5] = 0x7FC0
    case.json["generation_config.json"]["eos_token_id"] = 0
    source = case.write(tmp_path / "source")
    code, out, _ = doctor("fix", source, "-o", tmp_path / "out", "--from", base, *PLAN)
    assert code == 0 and "take the tensor from" in out and "No findings remain" in out
    code, out, err = doctor("check", source, "--fix", "-o", tmp_path / "two", "--concise", *PLAN)
    assert code == 1 and "W201" in out and "C105" not in out and "✓  C105" in err and "doctor-stage" not in out + err
    # What the cure left as it was is not read twice, and the report does not say that it was not read.
    assert (
        fix(source, tmp_path / "three", case.recipe, only=["C105"]).report.bytes_read
        == Checkpoint.open(source).total_bytes
    )


def test_a_rule_that_crashes_is_said_by_a_fix_too(tmp_path, doctor):
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "c194_breaks.py").write_text(
        '"""C194 breaks: it breaks.\n\nWhy: it does.\n"""\nfrom doctor.lint.rule import rule\n\n\n'
        '@rule("C194", "error")\ndef breaks(checkpoint, config):\n    raise KeyError("x")\n    yield\n'
    )
    try:
        code, out, _ = doctor(
            "fix", tiny().write(tmp_path / "source"), "-o", tmp_path / "out", "--rules", tmp_path / "rules", *PLAN
        )
    finally:
        RULES.pop("C194", None)
        sys.modules.pop("doctor_extra_rules.c194_breaks", None)
    assert (
        code == 2
        and "☠  C194 crashed: checkpoint:: KeyError: 'x'; internal error (a bug in doctor): report it" in out
        and "Exit 2: C194 remains." in out
    )


def test_a_dry_run_needs_no_output(tmp_path, doctor):
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 0
    code, out, _ = doctor("fix", case.write(tmp_path / "source"), "--dry-run", *PLAN)
    assert (
        code == 0
        and "+++ fixed/generation_config.json" in out
        and "Nothing was written. No findings would remain." in out
    )
    assert os.listdir(tmp_path) == ["source"]


def test_an_adapter_is_not_merged_in_its_own_place_nor_into_a_packed_base(tmp_path, doctor):
    case = tiny("llama")
    _, packed = quantized(tmp_path / "packed", "gptq")
    base = case.write(tmp_path / "base")
    folder, _ = adapter(tmp_path / "adapter", case)
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))
    code, _, err = doctor("fix", folder, "--in-place", "--from", base, *PLAN)
    assert (
        code == 2
        and "a merged adapter is another model than the adapter, so it cannot replace it. Hint: Write a copy with -o."
        in " ".join(err.split())
    )
    result = fix(folder, tmp_path / "out", case.recipe, donor=packed)
    assert "is packed in the base; it must be the 16-bit original" in next(
        f.fix.title for f in result.plan.for_you if f.code == "F022"
    )
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(folder))) == before


def test_in_place_and_undo_from_the_command_line(tmp_path, doctor):
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 0
    source = case.write(tmp_path / "source")
    assert doctor("fix", source, "--in-place", *PLAN)[0] == 0
    assert json.loads((source / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    code, out, _ = doctor("undo", source)
    assert (
        code == 0
        and "is as it was before the fix" in out
        and json.loads((source / "generation_config.json").read_text())["eos_token_id"] == 0
    )


@pytest.mark.parametrize(
    "args",
    [
        ("fix", "x"),
        ("fix", "x", "-o", "y", "--in-place"),
        ("check", "x", "--fix"),
        ("check", "x", "y", "--fix", "-o", "z"),
    ],
)
def test_unclear_orders_are_usage_errors(doctor, args):
    code, _, err = doctor(*args)
    assert code == 2 and "Error: " in err
