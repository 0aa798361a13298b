"""Lines of text for a terminal: colours, width in cells, hanging indents, links.

Everything printed is a rich Text, never markup: a tensor element is written [3117, 9204] and markup would eat it. Lines
are wrapped here with a hanging indent, in cells and not characters, so that CJK text stays inside its column; no line
ends in blanks, so piped output can be compared.
"""

import re
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from doctor.locale.catalogue import say, translated
from doctor.report.text import pad, safe

Steps = Sequence[tuple[str, str]]  # (command, what it does)

MAX_WIDTH = 110  # longer lines are hard to read, however wide the window


COLOURS = {
    "error": "bold red",
    "warning": "bold yellow",
    "info": "bold cyan",
    "ok": "bold green",
    "skipped": "bright_black",
    "crashed": "bold red",
}


class Screen:
    """Lines of Text for a console of a given width."""

    def __init__(self, console: Console):
        self.console = console
        self.width = max(min(console.width, MAX_WIDTH), 40)
        self.links = shows_links(console)

    def code(self, text: str, entry, style: str = "") -> Text:
        """A rule's code, linked to its page where the terminal can."""
        return styled((text, style + (page_link(entry) if self.links else "")))

    def line(self, *parts: tuple[str, str] | str | Text) -> None:
        """One line as it is; what does not fit is folded by the terminal."""
        self.console.print(styled(*parts), soft_wrap=True)

    def hang(self, head: Text, body: Text, indent: int | None = None) -> None:
        """head, then body wrapped in the rest of the width, its further lines indented to where it began."""
        indent = head.cell_len if indent is None else indent
        room = max(self.width - max(indent, head.cell_len), 16)
        lines = wrap(self.console, body, room)
        for i, part in enumerate(lines):
            part.rstrip()
            self.line(head if i == 0 else Text(" " * indent), part)


def show_steps(screen: Screen, steps: Steps) -> None:
    """Print what to type next, what each does beside it where there is room. Commands are pasted, so never wrapped."""
    width = max((cell_len(command) for command, _what in steps), default=0)
    beside = all(8 + width + 3 + cell_len(translated(what)) <= screen.width for _command, what in steps)
    for i, (command, what) in enumerate(steps):
        head = styled(("  " + pad(say("next"), 6) if i == 0 else "        ", "bold"), (safe(command), "cyan"))
        if beside:
            screen.line(head, " " * (width - cell_len(command) + 3), (translated(what), "bright_black"))
        else:
            screen.line(head)
            screen.hang(Text("          "), Text(translated(what), "bright_black"))


def show_labelled(lines: Iterable[str], out: Console) -> None:
    """Print lines of a label of eight cells and a text, which is wrapped beside its label."""
    screen = Screen(out)
    for line in lines:
        ends = (n for n in range(len(line)) if cell_len(line[:n]) == _LABEL and line[n - 1] == " ")
        label = line[: next(ends, 0)]
        screen.hang(Text(label), Text(line[len(label) :]))


def show_plain(text: str, out: Console) -> None:
    """Print a text whose lines are of any length: they are wrapped where a person watches or COLUMNS is set. What is to
    be pasted or compared stays whole: differences of files, and the next command.
    """
    screen = Screen(out)
    piped = not out.is_terminal and "COLUMNS" not in out._environ
    for line in text.splitlines():
        blanks = line[: len(line) - len(line.lstrip(" "))]
        whole = line.startswith(say("next")) or (blanks and line[len(blanks) :].startswith(("-", "+", "@@", "~")))
        if piped or whole or cell_len(line) <= screen.width:
            screen.line(line)
        else:
            screen.hang(Text(blanks), Text(line[len(blanks) :]), len(blanks) + 3)


_LABEL = 8
_UNIT = re.compile(
    r"\s+|[“（《]*(?:[\u2e80-\u9fff\uff00-\uffef]|[^\s\u2e80-\u9fff\uff00-\uffef“”（）《》]+)[，。；：、！？）”》]*"
)


_CJK = re.compile("[\u2e80-\u9fff]")


def wrap(console: Console, body: Text, room: int) -> list[Text]:
    """Lines of at most `room` cells. Chinese breaks between any two characters, but no line begins with a comma or ends
    with a bracket that opens; rich knows only blanks, and would push a whole sentence to the next line.
    """
    if not _CJK.search(body.plain):
        return list(body.wrap(console, room, tab_size=4, no_wrap=False, overflow="fold")) or [Text()]
    cuts, used = [], 0
    for unit in _UNIT.finditer(body.plain):
        wide = cell_len(unit[0])
        if used + cell_len(unit[0].rstrip()) > room and used and not unit[0].isspace():
            cuts.append(unit.start())
            used = 0
        used += wide
    return [
        part
        for line in body.divide(cuts)
        for part in line.wrap(console, room, tab_size=4, no_wrap=False, overflow="fold")
    ]


def styled(*parts) -> Text:
    out = Text(no_wrap=True, end="")
    for part in parts:
        if isinstance(part, Text):
            out.append_text(part)
        elif isinstance(part, tuple):
            out.append(*part)
        else:
            out.append(part)
    return out


def console(file=None, width: int | None = None, **options) -> Console:
    """A console that prints what it is given: no markup, no emoji codes, no colouring of numbers. 100 columns where
    piped.
    """
    made = Console(file=file, highlight=False, markup=False, emoji=False, width=width, **options)
    if width is None and not made.is_terminal and "COLUMNS" not in made._environ:
        made.width = 100
    return made


def shows_links(out: Console) -> bool:
    """Whether this terminal makes a link of OSC 8. FORCE_HYPERLINK=0 or 1 decides; pipes, dumb and very old terminals
    get none.
    """
    env = out._environ
    term, vte = env.get("TERM", ""), env.get("VTE_VERSION", "")
    if not out.is_terminal or out.is_dumb_terminal or out.no_color or out.color_system is None:
        return False
    if env.get("FORCE_HYPERLINK"):
        return env["FORCE_HYPERLINK"] != "0"
    # The Linux console and VTE before 0.50 print the address itself; screen cuts it off.
    return not (
        env.get("CI")
        or term in ("", "linux")
        or (term.startswith(("screen", "vt")) and "TMUX" not in env)
        or (vte.isdigit() and int(vte) < 5000)
    )


def page_link(entry) -> str:
    """The style that links a rule to its file, whose first lines are its page; "" where it has no file."""
    file = getattr(sys.modules.get(entry.module), "__file__", None) if entry is not None else None
    return " link " + Path(file).as_uri().replace("file://", f"file://{socket.gethostname()}", 1) if file else ""


def aligned(cell: str, width: int, right: bool) -> str:
    blank = " " * (width - cell_len(cell))
    return blank + cell if right else cell + blank
