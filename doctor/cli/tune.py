"""`doctor tune`: scales and norm gains of a quantized checkpoint, tuned against its original."""

import sys
from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    PATH,
    checkpoint_argument,
    device_option,
    given,
    lang_option,
    memory_option,
    option,
    overwrite_option,
    progress_option,
    size_in_bytes,
)
from doctor.cli.output import emit_plain, exit_for, notice
from doctor.cli.progress import run_lines
from doctor.core.messages import _


@click.command(
    cls=Command,
    help=_(
        "Tune the scales and norms of a quantized checkpoint against the model that it was made from.\n\n"
        "Codes, shapes and config stay as they are, so it loads wherever it loaded before. Works on GPTQ, AWQ and "
        "compressed-tensors files of any tool. Where it does not help, nothing is written."
    ),
)
@checkpoint_argument
@option("--to", "original", metavar="ORIGINAL", required=True, help=_("The 16-bit checkpoint that it was made from."))
@option("-o", "--output", type=PATH, metavar="DIR", required=True, help=_("Directory to write; must not exist."))
@option(
    "--calibration",
    metavar="FILE|ORG/NAME",
    default=None,
    show_default=False,
    help=_("Text to tune on, as for quantize.  [default: Python's documentation; yours is better]"),
)
@option("--rows", type=int, default=None, help=_("Rows; one in eight is watched and not trained on.  [default: 64]"))
@option("--max-seq-length", type=int, default=None, help=_("Tokens per row, at most.  [default: 256]"))
@option(
    "--passes", type=int, default=None, help=_("Times that a row is trained on.  [default: 2 up to 48 rows, else 1]")
)
@option("--seed", type=int, default=0, help=_("Of everything that is drawn at random."))
@memory_option(_("Most memory that codes take; more is read again from disk.  [default: half of what is free]"))
@device_option
@lang_option
@progress_option
@overwrite_option
def command(
    path: str,
    original: str,
    output: Path,
    calibration: str | None,
    rows: int | None,
    max_seq_length: int | None,
    passes: int | None,
    seed: int,
    memory: str,
    device: str,
    overwrite: bool,
) -> None:
    """Prints the divergence before and after, and what was written."""
    from doctor import api
    from doctor.report.tune_text import render_tuning

    for name, value in (("--rows", rows), ("--passes", passes)):
        if value is not None and value < 1 + (name == "--rows"):
            raise click.UsageError(
                _("{flag} {value}: must be {least} or more.", flag=name, value=value, least=1 + (name == "--rows"))
            )
    options = given(
        calibration=calibration,
        rows=rows,
        max_seq_length=max_seq_length,
        passes=passes,
        memory=size_in_bytes(memory),
    )
    with run_lines(notice) as line:
        done = api.tune(path, original, output, seed=seed, overwrite=overwrite, say=line, device=device, **options)
    emit_plain(render_tuning(done, original))
    if done.report is None:
        sys.exit(1)
    exit_for([done.report])
