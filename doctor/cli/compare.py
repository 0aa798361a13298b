"""`doctor compare`: quantized models of one original side by side."""

import sys
from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    KV_FORMATS,
    complete_path,
    device_option,
    format_option,
    given,
    lang_option,
    option,
    outputs_of,
    progress_option,
    text_option,
)
from doctor.cli.output import emit_table, json_on_failure
from doctor.cli.progress import layer_bars
from doctor.core.messages import _


@click.command(
    cls=Command,
    help=_(
        "Which quantized model is closest to its original, and by more than chance?\n\n"
        "All run over the same rows, one decoder layer of each in memory: divergence, perplexity and agreement with "
        "their spreads, sizes, and the differences by a paired bootstrap over the rows."
    ),
)
@click.argument("paths", nargs=-1, required=True, metavar="QUANTIZED QUANTIZED...", shell_complete=complete_path)
@option("--original", required=True, metavar="ORIGINAL", help=_("The 16-bit checkpoint that they were made from."))
@text_option(_("Text to compare on.  [default: texts of doctor]"))
@option("--context", type=int, default=None, help=_("Tokens of a row.  [default: 512]"))
@option("--rows", type=int, default=None, help=_("Rows, at most; they do not overlap.  [default: 24]"))
@device_option
@format_option(KV_FORMATS)
@lang_option
@progress_option
def command(
    paths: tuple[str, ...],
    original: str,
    text: Path | None,
    context: int | None,
    rows: int | None,
    device: str,
    formats: tuple[str, ...],
) -> None:
    """Exits 1 where a model computes NaN or Inf: which one to take is a choice, not a defect."""
    from doctor import api

    if len(paths) < 2:
        raise click.UsageError(
            _("compare: give two quantized models or more; `doctor verify ORIGINAL QUANTIZED` looks at one.")
        )
    outputs = outputs_of(formats, known=KV_FORMATS)
    with json_on_failure(outputs):
        with layer_bars() as tick:
            found = api.compare(
                paths, original, progress=tick, device=device, **given(text=text, context=context, rows=rows)
            )
        from doctor.report.ranking_text import ranking_page

        emit_table(ranking_page(found), outputs)
    if not found.ok:
        sys.exit(1)
