"""`--help` in another language than English.

click breaks lines at blanks and counts characters. Chinese has no blanks and wide characters, so such a page is laid
out here.
"""

import re

import click
from rich.cells import cell_len
from rich.text import Text

from doctor.cli import groups
from doctor.core.messages import _
from doctor.locale.catalogue import say, translated
from doctor.report.screen import console, wrap

_MOST, _NAMES = 100, 34  # cells of a line, and of the column of names
CLICKS_OWN = _("Show this message and exit.")  # click's text, which no call of ours holds


def page(command: click.Command, ctx: click.Context) -> str:
    """What `command --help` prints, in the language that is set."""
    width = min(_MOST, console().width)
    usage = f"{ctx.command_path} {' '.join(command.collect_usage_pieces(ctx))}"
    lines = [say("Usage: {usage}", usage=usage), ""]
    for paragraph in translated(command.help or "").split("\n\n"):
        verbatim = paragraph.startswith("\b")
        body = paragraph.splitlines()[1:] if verbatim else _wrapped(paragraph, width - 2)
        lines += [*("  " + line for line in body), ""]
    for heading, members in groups.grouped(command.get_params(ctx)):
        options = [record for p in members if (record := _option(p, ctx))]
        lines += [say("{heading}:", heading=translated(heading)), *_table(options, width), ""]
    del lines[-1]
    if isinstance(command, click.Group):
        shown = [
            (name, translated(one.short_help or one.help or "").split("\n")[0])
            for name, one in command.commands.items()
        ]
        lines += ["", say("Commands:"), *_table(shown, width)]
    if examples := getattr(command, "examples", ()):
        lines += ["", say("Examples:"), *("  " + line for line in examples)]
    if command.epilog:
        lines += ["", *("  " + line for line in _wrapped(translated(command.epilog), width - 2))]
    return "\n".join(lines)


def _option(param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
    record = param.get_help_record(ctx)
    if record is None or not isinstance(param, click.Option):
        return None
    names, text = record
    help = param.help or ""
    extra = text.removeprefix(help).strip().removeprefix("[").removesuffix("]")  # "default: 4; required", or ""
    notes = [_note(part) for part in extra.split("; ") if part]
    text, stated = translated(help), ""
    if match := re.search(r"\s{2}\[(.*)\]$", text):  # a default that is no value, said in the text itself
        text, stated = text[: match.start()], match[1]
    return names, text + "".join(say(" ({note})", note=note) for note in (stated, *notes) if note)


def _note(part: str) -> str:
    """What click says of an option, in the language that is set."""
    key, colon, value = part.partition(": ")
    if colon and key == "default":
        return say("default: {value}", value=value)
    return say("required") if part == "required" else part


def _table(rows: list[tuple[str, str]], width: int) -> list[str]:
    column = 4 + min(_NAMES, max((cell_len(names) for names, _text in rows), default=0))
    lines = []
    for names, text in rows:
        body = _wrapped(text, width - column) if text else [""]
        if cell_len(names) > column - 4:
            lines.append(f"  {names}")
            names = ""
        lines.append(f"  {names:<{column - 2}}{body[0]}".rstrip())
        lines += [" " * column + line for line in body[1:]]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    return [line.plain.rstrip() for line in wrap(console(width=width), Text(" ".join(text.split("\n"))), width)]
