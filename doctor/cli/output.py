"""Where results go: reports to the screen or to files, notices to stderr, the verdict into the exit code."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from doctor.cli import stderr
from doctor.cli.failures import of_extra
from doctor.cli.options import KV_FORMATS
from doctor.core.errors import MachineError
from doctor.core.messages import _
from doctor.locale import catalogue

if TYPE_CHECKING:
    from doctor.lint.engine import Report
    from doctor.report.screen import Steps

Outputs = Sequence[tuple[str, str]]  # (format, file or "" for stdout)


def notice(text: str) -> None:
    """A line on stderr, in the reader's language."""
    stderr.line(text)


class json_on_failure:
    """Inside it an error is also written as a JSON document wherever -f json asked for one."""

    def __init__(self, outputs: Outputs):
        self.outputs = outputs

    def __enter__(self) -> "json_on_failure":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, click.ClickException):
            return
        from doctor.report.formats.json_report import failure

        for name, file in self.outputs:
            if name == "json":
                write(failure(of_extra(error) or error), file)


def emit(
    reports: list["Report"], outputs: Outputs, verbose: bool = False, matrix: bool = False, then: "Steps" = ()
) -> None:
    """Print or write each format. The screen goes through rich, so that it knows the terminal's width and colours.
    then: what to type next, which the screen alone says.
    """
    from doctor.report import render

    for name, file in outputs:
        if name == "full" and not file:
            from doctor.report.formats.terminal import show
            from doctor.report.screen import console

            show(reports, console(sys.stdout), verbose, matrix, then)
        elif name == "statistics":
            from doctor.report.formats.terminal import show_statistics
            from doctor.report.screen import console

            for report in reports:
                show_statistics(report, console(sys.stdout))
        else:
            write(render(name, reports, catalogue.current()), file)


def emit_kvcache(result: Any, outputs: Outputs) -> None:
    """The same for a KvReport."""
    from doctor.report.kv_page import kvcache_html
    from doctor.report.kv_text import kvcache_json, kvcache_markdown, render_kvcache, show_kvcache

    _emit(result, outputs, (render_kvcache, kvcache_json, kvcache_markdown, kvcache_html), show_kvcache)


def emit_advice(advice: Any, outputs: Outputs, verbose: bool = False) -> None:
    """The same for an Advice."""
    from doctor.report.advice_text import advice_html, advice_json, advice_markdown, render_advice, show_advice

    writers = (render_advice, advice_json, advice_markdown, advice_html)
    _emit(advice, outputs, writers, partial(show_advice, verbose=verbose))


def emit_table(page: Any, outputs: Outputs) -> None:
    """The same for a TablePage."""
    from doctor.report.table_page import render_table, show_table, table_html, table_json, table_markdown

    _emit(page, outputs, (render_table, table_json, table_markdown, table_html), show_table)


def _emit(result: Any, outputs: Outputs, writers: Sequence[Callable[[Any], str]], show: Callable[..., None]) -> None:
    """Print or write a result in each format. writers: one for each of KV_FORMATS; show: prints it on a console."""
    from doctor.report.screen import console

    written_by = dict(zip(KV_FORMATS, writers, strict=True))
    for name, file in outputs:
        if name == "full" and not file:
            show(result, console(sys.stdout))
        else:
            write(written_by[name](result), file)


def emit_plain(text: str) -> None:
    """Print a text, wrapped for the terminal."""
    from doctor.report.screen import console, show_plain

    show_plain(text, console(sys.stdout))


def write(text: str, file: str) -> None:
    """To a file, which is said on stderr; "" is stdout. Raises MachineError where it cannot be written."""
    if not file:
        sys.stdout.write(text)
        return
    try:
        with open(
            file,
            "a" if file == os.environ.get("GITHUB_STEP_SUMMARY") else "w",
            encoding="utf-8",
            errors="backslashreplace",
        ) as out:
            out.write(text)
    except OSError as error:
        raise MachineError(
            _("{file}: {reason}.", file=file, reason=error.strerror), _("Give a file that can be written.")
        ) from None
    notice(_("Wrote {file}", file=file))


def read_text(path: Path) -> str:
    """A report's text, - for stdin. Raises MachineError."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(
            _("{file}: {reason}.", file=path, reason=getattr(error, "strerror", None) or error),
            _("Give a report made with -f json:FILE."),
        ) from None


def read_reports(path: Path) -> list["Report"]:
    """Reports of a JSON file, - for stdin. Raises DoctorError."""
    from doctor.report.formats.json_report import read

    return read(read_text(path))


def exit_for(reports: Iterable["Report"], fail_on_skipped: bool = False) -> NoReturn:
    """End the process: 0 where every report is ok, 1 for findings or skipped rules, 2 for a crashed rule."""
    reports = list(reports)
    if any(r.crashed for r in reports):
        sys.exit(2)
    silent = fail_on_skipped and any(run.status == "skipped" for r in reports for run in r.runs)
    sys.exit(1 if silent or not all(r.ok for r in reports) else 0)
