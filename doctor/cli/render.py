"""`doctor render`: a saved report in another format."""

from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import KV_FORMATS, PATH, format_options, outputs_of
from doctor.cli.output import emit, read_text
from doctor.cli.saved import emitter
from doctor.core.messages import _


@click.command(
    cls=Command,
    help=_(
        "Render a saved report in another format.\n\n"
        "Needs only the JSON that `doctor check -f json:REPORT.json` wrote (or quantize, verify, compare, kvcache, "
        "advise), not the checkpoint; or the receipt, doctor.json, in what `doctor quantize` wrote."
    ),
)
@click.argument("report", type=PATH, metavar="REPORT.json")
@format_options
def command(report: Path, formats: tuple[str, ...], concise: bool, verbose: bool) -> None:
    """Exits 0 whatever the report says."""
    text = read_text(report)
    write = emitter(text, verbose)
    if write is not None:
        return write(outputs_of(formats, concise, KV_FORMATS))
    from doctor.report.formats.json_report import read

    reports = read(text)
    for one in reports:
        one.checkpoint = one.checkpoint or report.absolute().parent.name  # a receipt does not know its directory's name
    emit(reports, outputs_of(formats, concise), verbose)
