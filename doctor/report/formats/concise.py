"""One finding, one line, with a place that editors make clickable: `file:line:column: CODE [*] message`."""

from doctor.lint.engine import Report
from doctor.locale.catalogue import counted
from doctor.report import presentation, verdict
from doctor.report.presentation import Group
from doctor.report.text import safe, size

_MARK = {"safe": "[*] ", "unsafe": "[!] "}


def render(reports: list[Report]) -> str:
    """All reports, each ending in its own count."""
    return "".join(line + "\n" for report in reports for line in lines(report))


def lines(report: Report) -> list[str]:
    found = presentation.groups(report)
    out = [_line(report, g) for root in found for g in (root, *root.effects)]
    out += [
        f"☠ {r.rule.code} crashed: {safe(r.crashed)}; internal error (a bug in doctor): report it"
        for r in report.crashed
    ]
    facts = verdict.run_facts(report).replace(" · ", ", ").replace(" run", " run", 1)
    if found:
        out.append(
            f"Found {presentation.tally(found)} in {_looked_at(report)} for {verdict.plan_label(report)} ({facts})"
        )
        out += _fixes(found)
    else:
        mark, sentence = verdict.verdict(report)
        out.append(f"{presentation.MARKS[mark]} {safe(report.checkpoint)}: {sentence}; {_looked_at(report)} ({facts})")
    return out


def _looked_at(report: Report) -> str:
    s = report.summary
    read = "" if verdict.weights_read(report) else ", weights not read"
    return f"{counted('{n:,} tensor', '{n:,} tensors', s.get('tensors', 0))}, {size(s.get('bytes', 0))}{read}"


def _line(report: Report, group: Group) -> str:
    where = group.first.where
    index = f" at [{', '.join(map(str, where.index))}]" if where.index is not None else ""
    more = ""
    if len(group.all) > 1:
        more = (
            f" ({len(group.all)} tensors)"
            if group.folds_into_message
            else f" (and {len(group.all) - 1} more: {group.names})"
        )
    state = " (new)" if group.first.baseline_state == "new" else ""
    because = f" (because of {group.first.consequence_of})" if group.first.consequence_of else ""
    place = safe(presentation.path_of(report, where.file)) + presentation.spot(where)
    return f"{place}: {group.code} {_MARK.get(group.safety, '')}{group.message}{index}{more}{because}{state}"


def _fixes(found: list[Group]) -> list[str]:
    by = presentation.fixable(found)
    parts = []
    if by["safe"]:
        parts.append(f"[*] {counted('{n:,} safe fix', '{n:,} safe fixes', len(by['safe']))} with `doctor fix`")
    if by["unsafe"]:
        parts.append(f"[!] {len(by['unsafe'])} more with `--unsafe-fixes`")
    yours = [group for group in (*by["manual"], *by["by name"]) if group.first.severity != "info"]
    if yours:
        codes = ", ".join(dict.fromkeys(g.code for g in yours))
        parts.append(f"{len(yours)} need{'s' if len(yours) == 1 else ''} you ({codes})")
    return ["; ".join(parts)] if parts else []
