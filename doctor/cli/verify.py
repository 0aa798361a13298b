"""`doctor verify`: a quantized model beside its original."""

from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    PATH,
    complete_path,
    device_option,
    format_options,
    given,
    memory_option,
    option,
    outputs_of,
    progress_option,
    size_in_bytes,
    text_option,
    words,
)
from doctor.cli.output import emit, exit_for, json_on_failure
from doctor.cli.progress import layer_bars
from doctor.core.messages import _


@click.command(
    cls=Command,
    help=_(
        "Compare a quantized model with its original.\n\n"
        "Measures perplexity, divergence of the next-token distributions, and collapse of greedy replies."
    ),
)
@click.argument("original", metavar="ORIGINAL", shell_complete=complete_path)
@click.argument("quantized", metavar="QUANTIZED", shell_complete=complete_path)
@text_option(_("Text to compare on.  [default: texts of doctor]"))
@option("--context", type=int, default=None, help=_("Tokens of a row.  [default: 512]"))
@option("--rows", type=int, default=None, help=_("Rows, at most; they do not overlap.  [default: 24]"))
@memory_option(_("Memory for whole models, as 24GB: greedy replies need them.  [default: half of what is free]"))
@device_option
@option(
    "--client",
    type=click.Choice(("transformers", "vllm", "llama.cpp")),
    default=None,
    help=_("Also let this client run the quantized files, and compare what it computes."),
)
@option(
    "--client-python",
    type=PATH,
    default=None,
    metavar="PYTHON",
    help=_("Interpreter of the environment that holds the client.  [default: doctor's own]"),
)
@option(
    "--tasks",
    default="",
    metavar="NAMES",
    help=_(
        "Also score both: choices, a small test that needs no network, and tasks of lm-evaluation-harness where it is "
        "installed, as gsm8k,arc_easy."
    ),
)
@format_options
@progress_option
def command(
    original: str,
    quantized: str,
    text: Path | None,
    context: int | None,
    rows: int | None,
    memory: str,
    device: str,
    client: str | None,
    client_python: Path | None,
    tasks: str,
    formats: tuple[str, ...],
    concise: bool,
    verbose: bool,
) -> None:
    """Exits 1 for findings on the quantized model."""
    from doctor import api

    outputs = outputs_of(formats, concise)
    with json_on_failure(outputs):
        with layer_bars() as tick:
            report = api.verify(
                original,
                quantized,
                progress=tick,
                **given(
                    text=text,
                    context=context,
                    rows=rows,
                    memory=size_in_bytes(memory),
                    device=device,
                    client=client,
                    client_python=client_python,
                    tasks=words([tasks]) or None,
                ),
            )
        emit([report], outputs, verbose)
    exit_for([report])
