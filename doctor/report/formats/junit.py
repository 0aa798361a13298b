"""JUnit XML: a suite per checkpoint, a case per rule. Rules that passed are listed too, else CI would show "0 tests"
when all is well.
"""

import re
from xml.etree import ElementTree as ET

from doctor.lint.engine import Report, RuleRun
from doctor.report import presentation, verdict
from doctor.report.presentation import Group
from doctor.report.text import safe

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(reports: list[Report]) -> str:
    """All reports as one document."""
    root = ET.Element("testsuites", name="doctor")
    for report in reports:
        _suite(root, report)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, report: Report) -> None:
    found = [g for top in presentation.groups(report) for g in (top, *top.effects)]
    runs = [r for r in report.runs if r.status != "not applicable"]
    failed = {g.code for g in found if g.first.severity != "info"}
    suite = ET.SubElement(
        root,
        "testsuite",
        name=_xml(f"{report.checkpoint} {verdict.plan_label(report)}"),
        tests=str(len(runs)),
        failures=str(sum(r.rule.code in failed and not r.crashed for r in runs)),
        errors=str(len(report.crashed)),
        skipped=str(verdict.skipped(report)),
        time=f"{report.seconds:.3f}",
    )
    for run in runs:
        _case(suite, report, run, [g for g in found if g.code == run.rule.code])


def _case(suite: ET.Element, report: Report, run: RuleRun, found: list[Group]) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=_xml(f"doctor.{run.rule.area.lower()}"),
        name=f"{run.rule.code} {run.rule.name}",
        time=f"{run.seconds:.3f}",
    )
    bad = [g for g in found if g.first.severity != "info"]
    if run.crashed:
        ET.SubElement(case, "error", message=_xml(run.crashed), type="crash")
    elif bad:
        element = ET.SubElement(case, "failure", message=_xml(bad[0].message), type=bad[0].first.severity)
        element.text = _xml("\n".join(_line(report, g) for g in bad))
    elif run.status == "skipped":
        ET.SubElement(case, "skipped", message=_xml(max(run.reasons, key=lambda r: run.reasons[r])))
    notes = [g for g in found if g.first.severity == "info"]
    if notes:
        ET.SubElement(case, "system-out").text = _xml("\n".join(_line(report, g) for g in notes))


def _line(report: Report, group: Group) -> str:
    file, line, column = presentation.anchor(group.first)
    more = "" if group.folds_into_message else f" (and {len(group.all) - 1} more: {group.names})"
    fixes = "".join(
        f"\n  {label}: {text}"
        for label, text in presentation.fixes(group, presentation.page_rule(report, group.code), report)
    )
    return f"{file}:{line}:{column}: {group.first.severity} {group.message}{more}{fixes}"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", "\n".join(safe(line) for line in text.split("\n")))
