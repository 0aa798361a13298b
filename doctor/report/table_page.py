"""A result that is one table with a sentence above it: as a screen, Markdown, HTML and JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from doctor.core.version import __version__
from doctor.locale.catalogue import current, say
from doctor.report.screen import COLOURS, Screen, aligned, console, styled
from doctor.report.text import pad, safe


@dataclass(frozen=True)
class TablePage:
    """title: what it is about, below it `about`. sentence: what the table says, with its mark (ok, warning, error).
    numbers: columns of figures; droppable: columns that a narrow screen leaves out, the first ones first. json: the
    whole document.
    """

    title: str
    about: Sequence[str]
    mark: str
    sentence: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    json: str
    numbers: frozenset[int] = frozenset()
    droppable: Sequence[int] = ()
    more: Sequence[str] = ()  # sentences below the table
    notes: Sequence[str] = ()  # what its columns mean
    commands: Sequence[str] = field(default=())


def render_table(page: TablePage) -> str:
    """The screen as plain text, 100 columns wide."""
    text = io.StringIO()
    show_table(page, console(text, width=100))
    return text.getvalue()


def show_table(page: TablePage, out: Console) -> None:
    """Print the screen."""
    screen = Screen(out)
    screen.hang(styled((f"doctor {__version__}  ", "bold")), Text(safe(page.title), "cyan"))
    for line in page.about:
        screen.hang(Text("  "), Text(safe(line)))
    screen.line()
    screen.hang(Text("  "), Text(safe(page.sentence), COLOURS[page.mark]))
    screen.line()
    columns = list(range(len(page.heads)))
    wide = [max(len(safe(row[i])) for row in (page.heads, *page.rows)) for i in columns]
    for i in page.droppable:
        if sum(wide[c] + 2 for c in columns) > screen.width:
            columns.remove(i)
    for n, row in enumerate([page.heads, *page.rows]):
        text = "  ".join(aligned(safe(row[i]), wide[i], i in page.numbers) for i in columns).rstrip()
        screen.line(styled(("  " + text, "bold" if n == 0 else "")))
    screen.line()
    for line in page.more:
        screen.hang(Text("  "), Text(safe(line)))
    for line in page.notes:
        screen.hang(Text("  "), Text(safe(line), "bright_black"))
    for n, line in enumerate(page.commands):
        screen.line((f"  {pad(say('next') if n == 0 else '', 4)}  ", "bold"), (safe(line), "magenta"))


def table_markdown(page: TablePage) -> str:
    """The same as Markdown."""

    def cell(text: str) -> str:
        return safe(text).replace("|", "\\|")

    lines = [
        f"### {safe(page.title)}",
        "",
        *(safe(line) + "  " for line in page.about),
        "",
        f"**{safe(page.sentence)}**",
        "",
    ]
    lines.append("| " + " | ".join(map(cell, page.heads)) + " |")
    lines.append("|" + "|".join("--:" if i in page.numbers else "---" for i in range(len(page.heads))) + "|")
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in page.rows]
    below = [*page.more, *page.notes]
    lines += ["", *(f"- {safe(line)}" for line in below)] if below else []
    lines += ["", *(f"    {safe(line)}" for line in page.commands)] if page.commands else []
    return "\n".join(lines) + "\n"


def table_html(page: TablePage) -> str:
    """One page that asks the network for nothing, the JSON inside."""
    from doctor.report.formats.html import inside_script, template

    return template("table.html").render(
        page=page, safe=safe, say=say, lang=current(), version=__version__, data=inside_script(page.json)
    )


def table_json(page: TablePage) -> str:
    """The whole document."""
    return page.json + "\n"
