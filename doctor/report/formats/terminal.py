"""The full screen: recipe, findings with their pictures, a verdict by area, commands to paste."""

import io
import re

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from doctor.core.version import __version__
from doctor.lint.engine import Report
from doctor.locale.catalogue import counted, say, translated
from doctor.report import presentation, results, verdict
from doctor.report.matrix_text import blockers, in_every_way, plan_row, shown
from doctor.report.presentation import Group
from doctor.report.screen import COLOURS, Screen, Steps, aligned, console, show_steps, styled, wrap
from doctor.report.text import level, pad, safe, squeeze, window

_LABELS = {
    "fix": "green",
    "fix!": "yellow",
    "you": "magenta",
    "why": "bold",
    "else": "bold",
    "then": "bold",
    "do": "bold",
}


_GUTTER = "blue"


def render(reports: list[Report], width: int = 100, verbose: bool = False) -> str:
    """The screen as plain text."""
    file = io.StringIO()
    show(reports, console(file, width, no_color=True, force_terminal=False), verbose)
    return file.getvalue()


def show(reports: list[Report], out: Console, verbose: bool = False, matrix: bool = False, then: Steps = ()) -> None:
    """Print the screen of each report; with `matrix` also its recipes by GPU count. then: what to type next,
    besides what the findings ask for.
    """
    for i, report in enumerate(reports):
        if i:
            out.print()
        _report(Screen(out), report, verbose, then)
        if matrix:
            _matrix(Screen(out), report)


def _report(screen: Screen, report: Report, verbose: bool, then: Steps) -> None:
    found = presentation.groups(report)
    mark, sentence = verdict.verdict(report)
    if not found and mark == "ok":
        _ready(screen, report, sentence)
        _results(screen, report)
        if verbose:
            _box(screen, report, found)
        show_steps(screen, then)
    else:
        _head(screen, report)
        told: dict[str, list] = {}
        for group in found:
            screen.line()
            _group(screen, report, group, told)
        _crashes(screen, report)
        screen.line()
        if _results(screen, report):
            screen.line()
        _box(screen, report, found)
        show_steps(screen, [*verdict.next_steps(report, found), *then])
    if verbose:
        _rules(screen, report)


def _ready(screen: Screen, report: Report, sentence: str) -> None:
    head = styled(("✓ ", COLOURS["ok"]), (sentence, "bold"), "   ")
    screen.hang(head, Text(f"{safe(report.checkpoint)} · {verdict.sizes_of(report)}"), 2)
    read = say("every byte read") if verdict.weights_read(report) else say("weights not read")
    if report.skipped_tensors:
        read += say(", ") + say(
            "{tensors} not judged in full",
            tensors=counted("{n:,} tensor", "{n:,} tensors", len(report.skipped_tensors)),
        )
    left_out = say("{n} skipped", n=verdict.skipped(report))
    facts = verdict.run_facts(report).replace(left_out, left_out + say(" (-v says why)"), 1)
    tensors = counted("{n:,} tensor", "{n:,} tensors", report.summary.get("tensors", 0))
    kind = verdict.kind_of(report)
    judged = f"{tensors}{say(', ')}{read} · {facts}"
    screen.hang(Text("  "), Text(f"{kind} · {judged}" if kind else judged, "bright_black"))


def _head(screen: Screen, report: Report) -> None:
    from doctor.core.recipe import Recipe

    name = f"{safe(report.checkpoint)}   "
    screen.hang(styled((f"doctor {__version__}  ", "bold")), styled((name, "cyan"), verdict.what_it_is(report)))
    default = report.recipe == Recipe() and verdict.goal_of(report) == "quantize"
    hint = "   " + say("default recipe; --for, --bits, --group-size, --tp change it") if default else ""
    screen.hang(
        styled((pad(say("recipe"), len(f"doctor {__version__}  ")), "bold")),
        styled(verdict.plan_text(report), (hint, "bright_black")),
    )


def _group(screen: Screen, report: Report, group: Group, told: dict[str, list]) -> None:
    """One finding. told: code -> explanations already on the screen, which are not said twice for the same rule."""
    first, entry = group.first, presentation.page_rule(report, group.code)
    colour = COLOURS[first.severity]
    state = say("new") + " " if first.baseline_state == "new" else ""
    title, message = presentation.headline(group, entry)
    head = styled(
        (f"{state}{translated(first.severity)}[", colour), screen.code(group.code, entry, colour), ("] ", colour)
    )
    screen.hang(head, Text(title, "bold"), 2)
    if message:
        screen.hang(Text("  "), Text(message))
    _where(screen, group)
    where = first.where
    gutter = len(str(where.frame[-1][0])) + 3 if where.frame else 2
    bar = styled((" " * gutter + " |", _GUTTER))
    pictured = where.frame or first.strip or first.facts_table
    if pictured:
        screen.line(bar)
    if where.frame:
        _frame(screen, group, gutter, colour)
    if first.strip:
        _strip(screen, first.strip, bar, colour)
    if first.facts_table:
        if where.frame or first.strip:
            screen.line(bar)
        _table(screen, presentation.table(first), bar)
    if pictured:
        screen.line(bar)
    last, before = "", told.setdefault(group.code, [])
    here = _explanations(report, group, entry)
    for label, body in [line for line in here if line not in before]:
        again, last = label == last, label
        screen.hang(
            styled(
                (" " * gutter + ("   " if again else " = "), _GUTTER),
                (pad("" if again else translated(label), 7), _LABELS[label]),
            ),
            Text(body),
        )
    before += here


def _where(screen: Screen, group: Group) -> None:
    where = group.first.where
    head = styled(("  --> ", _GUTTER))
    if where.tensor:
        element = "" if where.index is None else "[" + ", ".join(map(str, where.index)) + "]"
        byte = "" if where.byte is None else f" (byte {where.byte:,})"
        body = styled(
            (safe(where.file), "cyan"),
            " : " if where.file else "",
            safe(where.tensor) + element,
            (byte, "bright_black"),
        )
    else:
        body = styled((safe(where.file) + presentation.spot(where), "cyan"))
    if len(group.all) > 1:
        more = (
            "  " + say("and {n} more", n=len(group.all) - 1) + ("" if group.folds_into_message else f": {group.names}")
        )
        body.append(more, "bright_black")
    screen.hang(head, body)


def _frame(screen: Screen, group: Group, gutter: int, colour: str) -> None:
    """Lines of the JSON file with carets under the value, and the note beside them."""
    where = group.first.where
    room = screen.width - gutter - 3
    column, length, shown = where.column or 1, where.length or 1, ""
    for number, line in where.frame:
        at = column if number == where.line else 1
        text, begin = window(line, at, length, room // 2 if cell_len(line) > room and not line.isascii() else room)
        screen.line((f"{number:>{gutter}} |", _GUTTER), " ", safe(text).rstrip())
        if number == where.line:
            shown, column = text, begin
    before = cell_len(safe(shown[: column - 1]))
    carets = max(cell_len(safe(shown[column - 1 : column - 1 + length])), 1)
    bar = styled((" " * gutter + " |", _GUTTER))
    marker = styled(bar, " " * (before + 1), ("^" * carets, colour))
    note = safe(translated(where.note))
    if not note:
        screen.line(marker)
    elif marker.cell_len + 1 + min(cell_len(note), 30) <= screen.width:
        pad = marker.cell_len + 1
        lines = Text(note, colour).wrap(screen.console, screen.width - pad)
        for i, part in enumerate(lines):
            part.rstrip()
            screen.line(*((marker, " ") if i == 0 else (bar, " " * (pad - bar.cell_len))), part)
    else:
        screen.line(marker)
        for part in Text(note, colour).wrap(screen.console, max(screen.width - gutter - 4, 16)):
            part.rstrip()
            screen.line(bar, "  ", part)


def _strip(screen: Screen, strip: dict, bar: Text, colour: str) -> None:
    """One row per label, one character per layer, each row against its own largest value."""
    labels = [safe(translated(k)) for k in strip]
    wide = min(max(map(cell_len, labels)), 24)
    layers = max(len(v) for v in strip.values())
    room = max(screen.width - bar.cell_len - wide - 20, 10)
    screen.line(
        bar,
        "  "
        + (
            say("by layer, 0 → {last}", last=layers - 1)
            if layers <= room
            else say("by layer, 0 → {last}, the largest of each {n}", last=layers - 1, n=-(-layers // room))
        ),
    )
    for label, values in zip(labels, strip.values(), strict=True):
        numbers = [v for v in values if isinstance(v, (int, float)) and v == v and abs(v) != float("inf")]
        top = max(map(abs, numbers), default=0)
        picture = level(squeeze(values, room), top)
        screen.line(
            bar,
            "    ",
            label.ljust(wide),
            "  ",
            (picture, colour if top or "?" in picture else "bright_black"),
            (f"   max {_number(top)}" if top else "", "bright_black"),
        )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _table(screen: Screen, table: tuple, bar: Text) -> None:
    """The arithmetic: first column left, the rest right; turned on its side where it is wider than the screen."""
    wide = max(map(len, table))
    rows = [[safe(cell) for cell in (*row, *([""] * (wide - len(row))))] for row in table]
    sizes = [max(cell_len(r[i]) for r in rows) for i in range(wide)]
    if sum(sizes) + 3 * wide > screen.width - bar.cell_len - 2 and wide > len(rows):
        rows = [list(column) for column in zip(*rows, strict=True)]
        sizes = [max(cell_len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [aligned(cell, n, i > 0) for i, (cell, n) in enumerate(zip(row, sizes, strict=True))]
        screen.line(bar, ("  " + "   ".join(cells)).rstrip())


def _explanations(report: Report, group: Group, entry) -> list[tuple[str, str]]:
    lines = []
    if entry is not None:
        if presentation.why(entry):
            lines.append(("why", presentation.why(entry)))
        lines += [("else", f"{s.tool}: {s.text}") for s in presentation.elsewhere(entry, report)]
    lines += presentation.fixes(group, entry, report)
    if group.effects:
        many: dict[str, int] = {}
        for effect in group.effects:
            label = f"{effect.code} {effect.first.name}"
            many[label] = many.get(label, 0) + len(effect.all)
        effects = [label + (f" × {n}" if n > 1 else "") for label, n in many.items()]
        lines.append(("then", say("also reported because of this: {codes}", codes=", ".join(effects))))
    return [(label, safe(body)) for label, body in lines]


def _crashes(screen: Screen, report: Report) -> None:
    for run in report.crashed:
        screen.line()
        screen.hang(
            styled(("☠ ", COLOURS["crashed"]), (say("{code} crashed", code=run.rule.code) + ": ", "bold")),
            Text(safe(translated(run.crashed)) + "; " + say("internal error (a bug in doctor): report it")),
            2,
        )


def _box(screen: Screen, report: Report, found: list[Group]) -> None:
    mark, sentence = verdict.verdict(report)
    colour = COLOURS[mark]
    inner = screen.width - 2
    title = f" {presentation.MARKS[mark]} {sentence} "
    while cell_len(title) > inner - 2 and re.search(", |，", title):
        title = re.split(r"(?:, |，)(?!.*(?:, |，))", title)[0] + " "
    screen.line(("╭─", colour), (title, colour), ("─" * (inner - 1 - cell_len(title)) + "╮", colour))
    for area in verdict.areas(report, found):
        head = styled(" ", (presentation.MARKS[area.mark], COLOURS[area.mark]), f"   {pad(area.name, 11)}  ")
        for i, part in enumerate(wrap(screen.console, Text(area.text), inner - head.cell_len - 1)):
            part.rstrip()
            row = styled(head if i == 0 else " " * head.cell_len, part)
            screen.line(("│", colour), row, " " * (inner - row.cell_len), ("│", colour))
    counted = presentation.tally(found).replace(say(", "), " · ")
    foot = f" {counted} · {verdict.run_facts(report)} "
    if cell_len(foot) > inner - 2:  # what was hidden and what is new may never be left out
        foot = f" {' · '.join(filter(None, (counted, verdict.since(report), verdict.suppressed(report))))} "
    screen.line(("╰" + "─" * (inner - 1 - cell_len(foot)), colour), (foot, colour), ("─╯", colour))


def _results(screen: Screen, report: Report) -> bool:
    """Numbers of a quantization or a comparison."""
    lines = results.results(report)
    wide = max((12, *(cell_len(label) + 2 for label, _text in lines)))
    for label, text in lines:
        screen.hang(styled(("  " + pad(label, wide), "bold")), Text(text))
    return bool(lines)


def _matrix(screen: Screen, report: Report) -> None:
    """Plans by GPU count: ready or not, and the codes in the way."""
    rows = report.extra.get("matrix")
    screen.line()
    if not rows:
        screen.line("  " + say("no matrix: it needs readable tensors and config.json"))
        return
    common, rows = shown(rows)
    if common:
        screen.hang(Text("  "), Text(in_every_way(common)))
    wide = max(cell_len(plan_row(row)) for row in rows)
    gpus = [cell["tp"] for cell in rows[0]["cells"]]
    screen.line(
        (
            "  " + pad(say("recipe"), wide) + "".join(f"{n:>5}" for n in gpus) + f" {say('GPUs')}  {say('in the way')}",
            "bold",
        )
    )
    for row in rows:
        head = styled(f"  {pad(plan_row(row), wide)}")
        for cell in row["cells"]:
            head.append("    ✓" if cell["ready"] else "    ✗", COLOURS["ok" if cell["ready"] else "error"])
        why = blockers(row["cells"])
        if why:
            screen.hang(styled(head, "       "), Text(why))
        else:
            screen.line(head)


def _rules(screen: Screen, report: Report) -> None:
    """-v: every rule, and the reason of each that judged nothing."""
    screen.line()
    wide = max((len(r.rule.name) for r in report.runs), default=0)
    reasons = {code: reason for code, _name, reason in verdict.skip_reasons(report)}
    for run in report.runs:
        if run.status == "run":
            mark, text = (
                "✓",
                say(
                    "{subjects}, {ms} ms",
                    subjects=counted("{n:,} subject", "{n:,} subjects", run.judged),
                    ms=f"{run.seconds * 1000:.1f}",
                ),
            )
            if run.reasons:
                reason = max(run.reasons, key=lambda r: run.reasons[r])
                text += say("; {n} not judged: {reason}", n=sum(run.reasons.values()), reason=translated(reason))
        elif run.status == "crashed":
            mark, text = "☠", run.crashed
        else:
            mark = "○"
            text = reasons[run.rule.code]
        head = styled(f"  {mark} {run.rule.code}  {run.rule.name:<{wide}}  ")
        if screen.width - head.cell_len >= 40:
            screen.hang(head, Text(safe(text), "bright_black"))
        else:
            screen.line(f"  {mark} {run.rule.code}  {run.rule.name}")
            screen.hang(Text(" " * 10), Text(safe(text), "bright_black"))


def show_statistics(report: Report, out: Console) -> None:
    """Findings by code, most first: what --statistics prints."""
    totals: dict[tuple[str, str, str], int] = {}
    for f in report.findings:
        totals[f.code, f.severity, f.name] = totals.get((f.code, f.severity, f.name), 0) + 1
    screen = Screen(out)
    for (code, severity, name), n in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        screen.line(f"{n:>6}  {code}  ", (pad(translated(severity), 8), COLOURS[severity]), name)
