"""The laws that every rule keeps, whatever it is about: one parametrised test runs them over all rule files."""

import re
import sys

import pytest

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES

load_rules()
CODES = sorted(RULES)


def judged(case, folder):
    return check(case.write(folder), case.recipe, facts=[(s, n, v) for (s, n), v in case.facts.items()])


def module(code):
    return sys.modules[RULES[code].module]


def lines(report):
    return [f"{f.code} {f.message}" for f in report.findings]


@pytest.mark.parametrize("code", CODES)
def test_page_has_its_parts(code):
    entry = RULES[code]
    assert entry.module.rsplit(".", 1)[1].startswith(code.lower() + "_")
    assert entry.module.rsplit(".", 1)[1][5:].replace("_", "-") == entry.name
    for section in ("Why", "Do", "False alarms", "Fix safety", "Sources"):
        assert len(entry.section(section)) > 3, f"{code} has no section {section}:"
    # Each quotation is read whole, also where it holds backticks itself.
    lines = [line for line in entry.section("Seen as").splitlines() if re.match("- [^:`]+: `", line)]
    for line, seen in zip(lines, entry.seen_as, strict=True):
        assert line in (f"- {seen.tool}: `{seen.text}`", f"- {seen.tool}: ``{seen.text}``"), (
            f"{code}: {line!r} is read as {seen.text!r}"
        )
        assert seen.text.count("`") % 2 == 0 or seen.text.endswith("`damp_percent="), (
            f"{code}: {line!r} is cut at a backtick"
        )
    for seen in entry.seen_as:
        assert len(seen.text) >= len("Killed"), f"{code}: {seen.text!r} is too short to recognise an error by"


@pytest.mark.parametrize("code", CODES)
def test_bad_example_gives_exactly_its_finding_with_all_rules_on(code, tmp_path):
    case, message = module(code).bad()
    report = judged(case, tmp_path)
    assert not report.crashed, [r.crashed for r in report.crashed]
    own = [f for f in report.findings if f.code == code]
    assert message in [f.message for f in own], lines(report)
    others = [f for f in report.findings if f.code != code and not f.consequence_of]
    assert not others, f"{code}'s example also gives {lines(report)}"


@pytest.mark.parametrize("code", CODES)
def test_no_rule_reads_tensors_on_its_own(code, tmp_path, monkeypatch):
    """Bytes of tensors are read by the scan, once; a look at headers has none of them."""
    case, _ = module(code).bad()
    monkeypatch.setattr(Checkpoint, "open_file", lambda self, shard: pytest.fail(f"{shard} was opened"))
    report = check(
        case.write(tmp_path), case.recipe, stage="header", facts=[(s, n, v) for (s, n), v in case.facts.items()]
    )
    assert not report.crashed, [r.crashed for r in report.crashed]


@pytest.mark.parametrize("code", CODES)
def test_good_example_is_judged_and_silent_under_all_rules(code, tmp_path):
    report = judged(module(code).good(), tmp_path)
    assert not report.crashed, [r.crashed for r in report.crashed]
    assert not report.findings, lines(report)
    run = next(r for r in report.runs if r.rule.code == code)
    assert run.judged, f"{code} looked at nothing: {run.status}, {run.reasons}"
