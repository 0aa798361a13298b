"""`doctor advise`: what a model can be served with in so much memory."""

import sys

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    KV_FORMATS,
    checkpoint_argument,
    count_of_tokens,
    format_option,
    given,
    lang_option,
    memory_option,
    option,
    outputs_of,
    size_in_bytes,
)
from doctor.cli.output import emit_advice, json_on_failure
from doctor.core.messages import _
from doctor.core.recipe import parse_runtime


@click.command(
    cls=Command,
    help=_(
        "What a model can be served with in so much memory, best first, with the commands.\n\n"
        "Compares schemes, group sizes, numbers of GPUs and KV caches by what fits, what they cost in quality and what "
        "the engine has kernels for. Works from headers and tables: no weight is read, of a repository nothing "
        "downloaded."
    ),
)
@checkpoint_argument
@memory_option(_("Memory of one GPU, as 24GB or 24GiB.  [default: that of --gpu]"))
@option("--gpu", default="", metavar="NAME", help=_("GPU of the table, as rtx4090 or h100; a wrong name lists them."))
@option("--gpus", type=int, default=1, help=_("GPUs that there are."))
@option(
    "--context",
    default=None,
    metavar="TOKENS",
    help=_("Tokens kept per sequence, as 32768 or 32k.  [default: 8192, or what the model is made for]"),
)
@option("--batch", type=int, default=1, help=_("Sequences at a time."))
@option(
    "--runtime", default="", metavar="NAME", help=_("Engine that serves it.  [default: vllm, of a GGUF file llama.cpp]")
)
@option("-v", "--verbose", is_flag=True, help=_("Every number of GPUs and every cache, and the commands of each row."))
@format_option(KV_FORMATS)
@lang_option
def command(
    path: str,
    memory: str,
    gpu: str,
    gpus: int,
    context: str | None,
    batch: int,
    runtime: str,
    verbose: bool,
    formats: tuple[str, ...],
) -> None:
    """Exits 1 where nothing fits."""
    from doctor import api

    outputs = outputs_of(formats, known=KV_FORMATS)
    with json_on_failure(outputs):
        advice = api.advise(
            path,
            gpu=gpu,
            gpus=gpus,
            batch=batch,
            runtime=parse_runtime(runtime)[0],
            **given(memory=size_in_bytes(memory), context=count_of_tokens(context)),
        )
        emit_advice(advice, outputs, verbose)
    if not advice.fitting:
        sys.exit(1)
