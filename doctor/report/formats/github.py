"""GitHub workflow commands: annotations beside the changed file.

GitHub shows at most 10 errors, 10 warnings and 10 notices of a step and drops the rest without a word, so errors come
first, layers are folded, and the tenth says how many were left out.
"""

from doctor.lint.engine import Report
from doctor.report import presentation, verdict
from doctor.report.presentation import Group
from doctor.report.text import safe

MOST = 10
_COMMAND = {"error": "error", "warning": "warning", "info": "notice"}


def render(reports: list[Report]) -> str:
    """Lines `::error title=…,file=…,line=…,col=…::message`, and a closing line for the log."""
    pairs = [(report, g) for report in reports for root in presentation.groups(report) for g in (root, *root.effects)]
    lines = []
    for severity, command in _COMMAND.items():
        here = [(r, g) for r, g in pairs if g.first.severity == severity]
        shown = here if len(here) <= MOST else here[: MOST - 1]
        lines += [_annotation(command, report, group) for report, group in shown]
        if len(here) > len(shown):
            left = ", ".join(dict.fromkeys(g.code for _, g in here[len(shown) :]))
            lines.append(f"::{command} title=doctor::{len(here) - len(shown)} more are not shown here: {left}")
    for report in reports:
        lines += [f"::error title={run.rule.code} crashed::{_value(run.crashed)}" for run in report.crashed]
        mark, sentence = verdict.verdict(report)
        facts = f"{presentation.tally(presentation.groups(report))}; {verdict.run_facts(report)}"
        lines.append(f"{presentation.MARKS[mark]} {safe(report.checkpoint)}: {sentence} ({facts})")
    return "\n".join(lines) + "\n"


def _annotation(command: str, report: Report, group: Group) -> str:
    file, line, column = presentation.anchor(group.first)
    path = presentation.path_of(report, file)
    more = "" if group.folds_into_message else f"\n{len(group.all)} alike: {group.names}"
    fixes = "".join(
        f"\n{label}: {text}"
        for label, text in presentation.fixes(group, presentation.page_rule(report, group.code), report)
    )
    spot = f"file={_property(path)},line={line},col={column}"
    title = _property(f"{group.code} {group.first.name}")
    return f"::{command} title={title},{spot}::{_value(group.message + more + fixes)}"


def _value(text: str) -> str:
    """A message: percent and line ends are written as GitHub reads them; other control characters as text."""
    lines = [safe(line) for line in text.split("\n")]
    return "%0A".join(line.replace("%", "%25") for line in lines)


def _property(text: str) -> str:
    return _value(text).replace(":", "%3A").replace(",", "%2C")
