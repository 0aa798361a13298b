"""Rules for people: a page, the answer to a pasted error, and the list."""

import json
import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from doctor.core.facts import COSTS
from doctor.core.messages import _
from doctor.lint import explain, readings
from doctor.lint.rule import AREAS, Rule
from doctor.locale import rule_pages
from doctor.locale.catalogue import counted, current, say, translated
from doctor.report.screen import COLOURS, Screen, styled
from doctor.report.text import one_line, pad, safe


def show_page(entry: Rule, rules: list[Rule], out: Console) -> None:
    """`doctor explain CODE`."""
    screen = Screen(out)
    screen.line()
    head = f"{entry.code}  {entry.name}"
    facts = " · ".join(
        [
            translated(entry.severity),
            translated(entry.certainty),
            translated(entry.area).lower(),
            say("needs {stage}", stage=entry.cost),
        ]
    )
    screen.hang(styled((head, "bold " + COLOURS[entry.severity].split()[-1]), "     "), Text(facts, "bright_black"))
    if entry.seen_as:
        for i, seen in enumerate(entry.seen_as):
            screen.hang(
                styled((pad(say("find me by") if i == 0 else "", 12), "bold")),
                styled(f'"{seen.text}"', (f"  {seen.tool}", "bright_black")),
            )
    _section(screen, _("What it checks"), sentence(rule_pages.sentence(entry, current())))
    for key, title in explain.SECTIONS[:-1]:
        _section(screen, title, sentence(rule_pages.section(entry, key, current())))
    if entry.module.startswith("doctor.rules."):
        _section(
            screen,
            _("Checked by"),
            say("rules/{file}, with its bad and good examples", file=entry.module.rpartition(".")[2] + ".py"),
        )
    _section(screen, _("Sources"), entry.section("Sources"))
    related = explain.relatives(entry, rules)
    if related:
        _section(screen, _("See also"), " · ".join(f"{r.code} {r.name}" for r in related))
    _section(screen, _("To know"), translated(explain.decider(entry)))


def sentence(text: str) -> str:
    """With a capital, unless the text begins with a name or an option, as auto_map, config.json or --tp."""
    first = text.split(" ", 1)[0]
    return text if re.search(r"_|\.\w|\d|^-", first) else text[:1].upper() + text[1:]


def _section(screen: Screen, title: str, text: str) -> None:
    if not text:
        return
    screen.line()
    screen.line((translated(title), "bold"))
    for paragraph in explain.paragraphs(text):
        bullet = paragraph.startswith(("- ", "* "))
        screen.hang(Text("  - " if bullet else "  "), Text(safe(paragraph[2:] if bullet else paragraph)))


def show_matches(text: str, matches: list[explain.Match], near: list[Rule], out: Console) -> None:
    """`doctor explain "error"`: what the message means or resembles, and the command that tells."""
    screen = Screen(out)
    other = explain.elsewhere(text, current())
    if other is not None and (not matches or (other.score, other.at) > (matches[0].score, matches[0].at)):
        _show_elsewhere(screen, other)
        if not matches:
            return
        screen.line()
    elif not matches:
        line = next((x for x in reversed(text.splitlines()) if x.strip()), "")
        screen.hang(
            Text("  "), styled((f'"{safe(line.strip())[:200]}"', "bold"), say("   no rule quotes this message."))
        )
        screen.line()
        screen.line("  " + say("nearest by shared words"))
        _list(screen, [(r, rule_pages.heading(r, current())) for r in near])
        screen.line()
        screen.hang(
            Text("  "), Text(say("If doctor check finds nothing either, please report the message: a rule is missing."))
        )
        return
    reading = readings.read(text, current()) if matches[0].read else None
    if reading is None:
        _show_quotation(screen, matches)
    else:
        screen.hang(Text("  "), styled((f'"{safe(reading.line)[:300]}"', "bold")))
        screen.line()
        screen.hang(Text("  " + pad(say("means"), 13)), Text(reading.says[:1].upper() + reading.says[1:]))
        screen.hang(Text("  " + pad(say("do"), 13)), Text(reading.do))
    screen.line()
    order = explain.minor(text)
    if order is not None:
        screen.hang(Text("  "), Text(_minor(order)))
        screen.line()
    _list(screen, [(m.rule, explain.decider(m.rule)) for m in matches[:8]])
    if len(matches) > 8:
        screen.line("  " + say("and {n} more", n=len(matches) - 8))
    screen.line()
    for label, command in _commands(matches):
        screen.hang(Text("  " + pad(translated(label), 13)), Text(command, "cyan"))
    screen.hang(Text("  " + pad(say("read more"), 13)), Text(f"doctor explain {matches[0].rule.code}", "cyan"))


def _show_quotation(screen: Screen, matches: list[explain.Match]) -> None:
    """The line that resembles a rule's quotation, and how many defects end so."""
    best = matches[0]
    tools = ", ".join(dict.fromkeys(m.seen.tool for m in matches[:4]))
    one = len(matches) == 1
    what = say(
        "{tools} · {defects} ends in words like these:" if one else "{tools} · {defects} end in words like these:",
        tools=tools,
        defects=say("one defect") if one else counted("{n:,} defect", "{n:,} defects", len(matches)),
    )
    quote = styled((f'"{safe(best.line)[:300]}"', "bold"))
    if quote.cell_len + cell_len(what) + 5 <= screen.width:
        screen.line("  ", quote, f"   {what}")
    else:
        screen.hang(Text("  "), quote)
        screen.hang(Text("  "), Text(what))


def _show_elsewhere(screen: Screen, found: explain.Elsewhere) -> None:
    screen.hang(Text("  "), styled((f'"{safe(found.line)[:300]}"', "bold"), f"   {found.tool}"))
    screen.line()
    screen.hang(Text("  " + pad(say("why"), 13)), Text(found.cause[:1].upper() + found.cause[1:]))
    screen.hang(Text("  " + pad(say("do"), 13)), Text(found.do))


def _minor(order: int) -> str:
    """What the order of the minor tells, at which a factorization failed."""
    if order == 1:
        return say(
            "Order 1: the very first element of the diagonal is not positive. As a rule all of H is NaN then, and no "
            "damping helps."
        )
    return say(
        "Order {n:,}: H breaks at input column {column:,} of the linear, counted from 0 in the order the tool takes "
        "them (with act-order not that of the weights). Late in the width it is rounding, which more damping fixes; at "
        "one more than the number of calibration tokens there are too few tokens; NaN or Inf in a column stops there "
        "as well.",
        n=order,
        column=order - 1,
    )


def _commands(matches: list[explain.Match]) -> Sequence[tuple[str, str]]:
    """(label, command): one check for all rules that need no calibration, for the server that spoke; after it the best
    match's own, where that is another.
    """
    own = explain.decider(matches[0].rule)
    cheap = [m.rule for m in matches[:8] if explain.decider(m.rule).startswith("doctor check")]
    if not own.startswith("doctor check") and matches[0].read:  # what is read is worth more than resemblance
        cheap = []
    if not cheap:
        return [(_("start with"), own)]
    latest = max((r.cost for r in cheap), key=COSTS.index)
    server = matches[0].seen.tool.lower()
    command = f"doctor check CKPT --select {','.join(r.code for r in cheap)}"
    command += f" --runtime {server}" if server in ("vllm", "sglang") else ""
    command += f" --stage {latest}" if latest in ("listing", "header") else ""
    return [(_("start with"), command)] + ([(_("after that"), own)] if matches[0].rule not in cheap else [])


def _list(screen: Screen, rows: list[tuple[Rule, str]]) -> None:
    wide = max(len(r.name) for r, _said in rows)
    beside = wide + 14 + max(cell_len(t) for _rule, t in rows) <= screen.width
    for entry, text in rows:
        head = styled(
            "  ", screen.code(entry.code, entry), "  ", (entry.name.ljust(wide), COLOURS[entry.severity]), "   "
        )
        if beside:
            screen.line(head, text)
        else:
            screen.line(styled("  ", screen.code(entry.code, entry), "  ", (entry.name, COLOURS[entry.severity])))
            screen.hang(Text("        "), Text(text, "bright_black"))


def show_rules(rules: list[Rule], out: Console) -> None:
    """The list, by area."""
    screen = Screen(out)
    wide = max(len(r.name) for r in rules)
    for area in (name for _first, name in AREAS if any(r.area == name for r in rules)):
        screen.line((translated(area), "bold"))
        for entry in (r for r in rules if r.area == area):
            head = styled(
                "  ",
                screen.code(entry.code, entry),
                "  ",
                (pad(translated(entry.severity), 8), COLOURS[entry.severity]),
                f"{entry.name.ljust(wide)}  ",
            )
            if screen.width - head.cell_len >= 30:
                screen.hang(head, Text(one_line(rule_pages.heading(entry, current())), "bright_black"))
            else:
                screen.line(head)
                screen.hang(Text("        "), Text(one_line(rule_pages.heading(entry, current())), "bright_black"))
    screen.line(
        say("{rules}; `doctor explain CODE` shows a page", rules=counted("{n:,} rule", "{n:,} rules", len(rules)))
    )


def rules_json(rules: list[Rule]) -> str:
    """A list of objects: identity, cost, page and quotations of every rule."""
    data = [
        {
            "code": r.code,
            "name": r.name,
            "title": r.title,
            "severity": r.severity,
            "certainty": r.certainty,
            "area": r.area,
            "scope": r.scope,
            "stage": r.cost,
            "needs": list(r.needs),
            "wants": list(r.wants),
            "implied_by": list(r.implied_by),
            "seen_as": [{"tool": s.tool, "text": s.text} for s in r.seen_as],
            "page": r.sections,
        }
        for r in rules
    ]
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def rules_markdown(rules: list[Rule]) -> str:
    """One table."""
    rows = []
    for r in rules:
        title = one_line(rule_pages.heading(r, current())).replace("|", "\\|")
        cells = [r.code, r.name, translated(r.severity), translated(r.certainty), r.cost, title]
        rows.append("| " + " | ".join(cells) + " |")
    heads = [say("code"), say("name"), say("severity"), say("certainty"), say("needs"), say("what it finds")]
    return "\n".join(["| " + " | ".join(heads) + " |", "|---|---|---|---|---|---|", *rows]) + "\n"


def show_settings(rows: list[tuple[str, object, str]], file, out: Console) -> None:
    """`doctor check --show-settings`: (key, value, origin) rows, in TOML's spelling, and the file that was read."""
    screen = Screen(out)
    screen.line((f"configuration  {file or 'no doctor.toml, no pyproject.toml with [tool.doctor]'}", "bold"))
    shown = [(key, _toml(value), origin) for key, value, origin in rows]
    wide, long = (max(len(row[i]) for row in shown) for i in (0, 1))
    for key, value, origin in shown:
        screen.line(
            f"  {key:<{wide}}  {safe(value):<{min(long, 48)}}  ",
            (origin, "bright_black" if origin == "built in" else "cyan"),
        )


def _toml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(str(v)) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)
