"""Markdown for a pull request's comment or a job's summary: verdict, recipes by GPU count, findings to unfold.

A comment holds 65,536 characters: findings are cut from the end and counted, the verdict never.
"""

from doctor.lint.engine import Report
from doctor.lint.explain import code_span
from doctor.locale.catalogue import say, translated
from doctor.report import presentation, results, verdict
from doctor.report.matrix_text import blockers, in_every_way, plan_row, shown
from doctor.report.presentation import Group
from doctor.report.text import safe

MOST = 60_000


def render(reports: list[Report]) -> str:
    """All reports, the room shared among them."""
    return "\n\n".join(_report(r, MOST // len(reports)) for r in reports) + "\n"


def _report(report: Report, room: int) -> str:
    found = presentation.groups(report)
    mark, sentence = verdict.verdict(report)
    head = [
        f"<!-- doctor:{_plain(report.checkpoint).replace('--', '-')} -->",
        f"### {presentation.MARKS[mark]} {sentence}",
        f"{_code(report.checkpoint)} · {_plain(verdict.what_it_is(report))} · **{presentation.tally(found)}** · "
        + verdict.run_facts(report),
    ]
    if results.results(report):
        head.append("\n".join(f"- **{label}** {_plain(text)}" for label, text in results.results(report)))
    if report.extra.get("matrix"):
        head.append(matrix(report.extra["matrix"]))
    parts, size, shown = head, sum(map(len, head)), 0
    for group in found:
        text = _finding(report, group)
        if size + len(text) > room:
            parts.append(
                say("{n} more findings do not fit here; `doctor check` prints them all.", n=len(found) - shown)
            )
            break
        parts.append(text)
        size, shown = size + len(text), shown + 1
    parts += [
        f"☠ **{say('{code} crashed', code=r.rule.code)}**: {_code(translated(r.crashed))}" for r in report.crashed
    ]
    return "\n\n".join(parts)


def matrix(rows: list[dict]) -> str:
    """Plans by GPU count: ready or not, and the codes in the way."""
    common, rows = shown(rows)
    gpus = [cell["tp"] for cell in rows[0]["cells"]]
    lines = [f"{in_every_way(common)}\n"] if common else []
    lines += [
        f"| {say('recipe')} | "
        + " | ".join([say("1 GPU") if n == 1 else str(n) for n in gpus])
        + f" | {say('in the way')} |",
        "|---|" + ":-:|" * len(gpus) + "---|",
    ]
    for row in rows:
        name = plan_row(row)
        lines.append(
            f"| {name} | "
            + " | ".join("✓" if c["ready"] else "✗" for c in row["cells"])
            + f" | {blockers(row['cells'])} |"
        )
    return "\n".join(lines)


def _finding(report: Report, group: Group) -> str:
    file, line, _ = presentation.anchor(group.first)
    spot = f"{file}:{line}" if group.first.where.line else file
    entry = presentation.page_rule(report, group.code)
    title, message = presentation.headline(group, entry)
    head = f"<b>{translated(group.first.severity)} {group.code}</b> {_html(title)} · <code>{_html(safe(spot))}</code>"
    lines = [f"<details><summary>{head}</summary>", ""]
    if message:
        lines += [_plain(message), ""]
    if not group.folds_into_message:
        lines += [f"{say('{n} alike', n=len(group.all))}: {_code(group.names)}", ""]
    if group.first.facts_table:
        lines += [_table(presentation.table(group.first)), ""]
    if entry is not None:
        lines += [f"**{say('why')}** {_plain(presentation.why(entry))}  "]
        lines += [
            f"**{say('else')}** {_plain(s.tool)}: {_code(s.text)}  " for s in presentation.elsewhere(entry, report)
        ]
    lines += [f"**{translated(label)}** {_plain(text)}  " for label, text in presentation.fixes(group, entry, report)]
    if group.effects:
        effects = ", ".join(f"{e.code} {e.first.name}" for e in group.effects)
        lines.append(f"**{say('then')}** " + say("also reported because of this: {codes}", codes=effects))
    return "\n".join([*lines, "", "</details>"])


def _table(rows) -> str:
    cells = ["| " + " | ".join(_plain(c).replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join([cells[0], "|" + "---|" + "--:|" * (len(rows[0]) - 1), *cells[1:]])


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no tag, no emphasis, no link, no mention."""
    text = _html(safe(text))
    for char in "\\`*_[]":
        text = text.replace(char, "\\" + char)
    return text.replace("@", "@\u200b")


def _code(text: str) -> str:
    """Inline code with as many backticks as the text needs."""
    return code_span(safe(text))
