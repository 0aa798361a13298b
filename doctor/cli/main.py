"""The command line: parses, calls doctor.api, prints, exits. No logic and no import of torch.

Exit 0: nothing at or above --fail-on. 1: findings. 2: the work could not be done (usage, files, or a rule
that crashed). 130: interrupted. Findings go to stdout; progress and notices to stderr.
"""

import gc
import os
import sys

import click

from doctor.cli import failures
from doctor.cli.command import Commands, Group, Option, take_language
from doctor.core.messages import _
from doctor.core.version import __version__
from doctor.locale import catalogue
from doctor.quant import held_import, import_stubs


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(
            f"doctor {__version__} (checkpoint-doctor), Python {sys.version.split()[0]}\n"
            "No telemetry: nothing leaves this machine."
        )
        ctx.exit()


@click.group(
    cls=Group,
    commands=Commands(
        advise="What a model can be served with in so much memory, best first, with the commands.",
        check="Say whether checkpoints are ready for a recipe.",
        compare="Which quantized model is closest to its original, and by more than chance?",
        completion="Print the script that completes in a shell.",
        convert="Write a quantized checkpoint in another stored format, without quantizing again.",
        explain="A rule's page, or what a pasted error points to.",
        facts="List the facts that a rule can ask for.",
        fix="Write a fixed copy of a checkpoint, beside it.",
        kvcache="Size of the KV cache, and the bits its keys need.",
        quantize="Check, calibrate, quantize and check the result.",
        render="Render a saved report in another format.",
        rules="List the rules.",
        trust="Allow a configuration file that a project or a checkpoint brings.",
        tune="Tune the scales and norms of a quantized checkpoint against the model that it was made from.",
        undo="Put back what `doctor fix --in-place` replaced.",
        verify="Compare a quantized model with its original.",
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=False,
    help=_(
        "Finds, explains and fixes what makes quantizing a language model fail, then quantizes it.\n\n"
        "\b\n"
        "doctor check ckpt/ --for gptq --tp 2       look, write nothing\n"
        "doctor fix ckpt/ -o fixed/                 write a fixed copy beside it\n"
        "doctor quantize fixed/ -o q4/              check, calibrate, quantize, check again\n"
        'doctor explain "Hessian is not invertible" what an error points to'
    ),
)
@click.option(
    "--version",
    cls=Option,
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help=_("Show the version and exit."),
)
@click.option(
    "--lang",
    cls=Option,
    type=click.Choice(catalogue.LANGUAGES),
    default=None,
    expose_value=False,
    callback=take_language,
    help=_("Language of this page and of the command's screens.  [default: the locale's]"),
)
def cli() -> None:
    """The group that every command belongs to; its texts stand above."""


def main(args: list[str] | None = None) -> None:
    """The entry point of both scripts: errors for the user without a traceback, and the exit code."""
    # A few objects for each tensor live to the end of a check; looking through them for garbage again and again took a
    # fifth of it.
    gc.set_threshold(100_000, 20, 20)
    if args is None:  # a process of doctor's own
        # Its notes are to who loads a model by hand ("falling back to its reference PyTorch implementation").
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import_stubs.install()
        held_import.install()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ must not end the run
    with failures.shown():
        cli.main(args, prog_name="doctor", standalone_mode=False)
