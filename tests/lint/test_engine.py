import json

import pytest

from doctor.api import check
from doctor.core.errors import CheckpointNotReady, DoctorError
from doctor.lint import engine
from doctor.lint import rule as rule_module
from doctor.lint.engine import fold, folded_name, select_rules
from doctor.lint.rule import RULES
from doctor.lint.testing import tiny

PAGE = '''"""{code} {name}: an invented defect.

Why: it is a test.
Do: nothing.
False alarms: none.
Fix safety: safe.
Sources: none.
"""
from doctor.lint.rule import Place, finding, rule
'''


@pytest.fixture
def rules_dir(tmp_path, monkeypatch):
    """A directory of extra rules; whatever they register is forgotten afterwards."""
    engine.load_rules()  # ours register once, when they are imported, and must not be forgotten with the others
    monkeypatch.setattr(rule_module, "RULES", dict(RULES))
    monkeypatch.setattr(engine, "RULES", rule_module.RULES)
    folder = tmp_path / "rules"
    folder.mkdir()

    def add(code, name, body):
        (folder / f"{code.lower()}_{name.replace('-', '_')}_{tmp_path.name}.py").write_text(
            PAGE.format(code=code, name=name) + body
        )
        return folder

    return add


def test_a_rule_of_the_user_runs_beside_ours(rules_dir, tmp_path):
    folder = rules_dir(
        "W991",
        "seen-tensor",
        '@rule("W991", "info")\ndef check(tensor, numel):\n    yield finding(f"{numel} values in {tensor.name}")\n',
    )
    report = check(tiny().write(tmp_path / "m"), tiny().recipe, rules_dirs=[folder])
    assert len([f for f in report.findings if f.code == "W991"]) == len(tiny().tensors) and report.ok


def test_a_rule_that_crashes_is_named_and_the_others_run(rules_dir, tmp_path):
    folder = rules_dir(
        "W992", "crash-here", '@rule("W992", "error")\ndef check(tensor, numel):\n    yield finding(str(1 // 0))\n'
    )
    case = tiny()
    case.down()[0, 0] = 0x7FC0
    report = check(case.write(tmp_path / "m"), case.recipe, rules_dirs=[folder])
    assert [r.rule.code for r in report.crashed] == ["W992"] and "ZeroDivisionError" in report.crashed[0].crashed
    assert "W201" in [f.code for f in report.findings]


@pytest.mark.parametrize(
    "body, words",
    [
        ('@rule("W993", "error", certainty="likely")\ndef check(tensor):\n    yield\n', "an error must be certain"),
        ('@rule("W993", "warning")\ndef check(thing):\n    yield\n', "scope 'thing'"),
        ('@rule("W993", "warning")\ndef check(tensor, n_nam):\n    yield\n', "nearest: n_nan"),
        ('@rule("W994", "warning")\ndef check(tensor):\n    yield\n', "must begin with 'W994"),
        ("syntax error", "cannot be loaded"),
    ],
)
def test_a_wrong_rule_file_is_refused_with_its_reason(rules_dir, body, words):
    folder = rules_dir("W993", "wrong-rule", body)
    with pytest.raises(DoctorError, match=words):
        engine.load_rules([folder])


def test_select_and_ignore_take_codes_families_names_and_certainties():
    rules = engine.load_rules()
    assert [r.code for r in select_rules(rules, ["nonfinite-weight"])] == ["W201"]
    assert {r.code[0] for r in select_rules(rules, ["W"])} == {"W"}
    assert "W201" not in [r.code for r in select_rules(rules, ["W"], ["W201"])]
    with pytest.raises(DoctorError, match="'W9x': no rule"):
        select_rules(rules, ["W9x"])


def test_what_was_not_looked_at_is_said(tmp_path):
    report = check(tiny().write(tmp_path), tiny().recipe, stage="header")
    run = next(r for r in report.runs if r.rule.code == "W201")
    assert (
        run.status == "skipped"
        and list(run.reasons) == ["needs values, but only header was asked for"]
        and report.bytes_read == 0
    )


def test_findings_alike_but_for_the_block_fold_into_one_line(tmp_path):
    case = tiny()
    for block in (0, 1):
        case.down(block)[0, 0] = 0x7FC0
    report = check(case.write(tmp_path), case.recipe)
    ((_first, group),) = fold(report.findings)
    assert len(group) == 2 and folded_name(f.where.tensor for f in group) == "model.layers.{0-1}.mlp.down_proj.weight"
    assert folded_name(["a.1.b", "a.2.b", "a.3.b", "a.9.b"]) == "a.{1-3,9}.b" and folded_name(["lm_head"]) == "lm_head"
    with pytest.raises(CheckpointNotReady, match="2 findings"):
        report.raise_for_findings()


def test_a_place_is_found_in_the_files_own_text(tmp_path):
    folder = tiny().write(tmp_path)
    text = (folder / "config.json").read_text()
    checkpoint = engine.Checkpoint.open(folder)
    spot = engine._located(rule_module.Place("config.json", "/bos_token_id"), checkpoint)
    line = text.split("\n")[spot.line - 1]
    assert line[spot.column - 1 : spot.column - 1 + spot.length] == "1" and spot.frame[-1] == (spot.line, line)
    absent = engine._located(rule_module.Place("config.json", "/not_there"), checkpoint)
    assert (absent.line, absent.column, absent.length) == (1, 1, 1)


def test_broken_json_is_pointed_at(tmp_path):
    folder = tiny().write(tmp_path)
    (folder / "generation_config.json").write_text('{\n "a": }')
    spot = engine._located(rule_module.Place("generation_config.json"), engine.Checkpoint.open(folder))
    assert (spot.line, spot.column) == (2, 7)
    assert json.loads((folder / "config.json").read_text())


def test_a_caret_stands_under_its_value_behind_tabs(tmp_path):
    folder = tiny().write(tmp_path)
    (folder / "generation_config.json").write_text('{\n\t"eos_token_id": 2\n}')
    spot = engine._located(rule_module.Place("generation_config.json", "/eos_token_id"), engine.Checkpoint.open(folder))
    assert spot.frame[-1][1][spot.column - 1] == "2"


def test_a_rule_files_page_may_be_indented_and_its_first_line_wrapped():
    from doctor.lint.rule import Rule, headline

    text = (
        "X901 my-rule: what is\n    wrong.\n\n    Why: because.\n\n    Seen as:\n    - Tool: `it broke`\n    - "
        "One: `set `a` to `b``\n    - Two: ```a` is not `b```\n"
    )
    assert headline(text, "X901") == ("my-rule", "what is wrong")
    assert headline("X901 my-rule: what is wrong.\nWhy: because.", "X901") == ("my-rule", "what is wrong")
    page = Rule("X901", *headline(text, "X901"), "error", "certain", "tensor", "header", (), lambda *_: (), text)
    assert page.section("Why") == "because." and [(s.tool, s.text) for s in page.seen_as] == [
        ("Tool", "it broke"),
        ("One", "set `a` to `b`"),
        ("Two", "`a` is not `b`"),
    ]
