"""What goes to stderr: lines for people, or with --progress json one JSON object a line, for whoever watches a run.

Each object of a step has the keys step, done, total, unit, seconds (since the step began) and left (seconds that it
will take yet, null where that is not known). A line for people becomes {"step": "note", "text": …, "seconds": …}, an
error {"step": "error", "text": …, "hint": …, "seconds": …}; seconds are those since the command began.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import click

from doctor.locale import catalogue
from doctor.report.text import safe_lines

MODES = ("bar", "lines", "json", "off")
_MODE = "doctor.progress"
_BEGAN = "doctor.began"
_LOCK = threading.Lock()  # bytes are counted from many threads, and a line is written whole


def take_mode(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """The callback of --progress."""
    if value:
        ctx.meta[_MODE] = value
    ctx.meta[_BEGAN] = time.monotonic()


def mode() -> str:
    """One of MODES: what --progress asks for, else a bar where a person watches; "" elsewhere."""
    ctx = click.get_current_context(silent=True)
    asked: str = ctx.meta.get(_MODE, "") if ctx is not None else ""
    return asked or ("bar" if _watched() else "")


def line(text: str) -> None:
    """A line for people, in the reader's language."""
    shown = safe_lines(catalogue.translated(text))
    if mode() == "json":
        write_json(step="note", text=shown, seconds=_seconds())
    else:
        click.echo(shown, err=True)


def error(message: str, hint: str) -> None:
    """An error and its hint."""
    message, hint = (safe_lines(catalogue.translated(text)) for text in (message, hint))
    if mode() == "json":
        return write_json(step="error", text=message, hint=hint, seconds=_seconds())
    click.echo(catalogue.say("Error: {message}", message=message), err=True)
    if hint:
        click.echo(catalogue.say("Hint: {hint}", hint=hint), err=True)


def write_json(**values: Any) -> None:
    """One object, on a line of its own."""
    with _LOCK:
        sys.stderr.write(json.dumps(values, ensure_ascii=False) + "\n")
        sys.stderr.flush()


def _seconds() -> float:
    ctx = click.get_current_context(silent=True)
    began = ctx.meta.get(_BEGAN) if ctx is not None else None
    return round(time.monotonic() - began, 3) if began is not None else 0.0


def _watched() -> bool:
    return sys.stderr.isatty() and not (
        os.environ.get("CI") or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") or os.environ.get("TERM") == "dumb"
    )
