"""`doctor kvcache`: the size of the KV cache, and the bits that its keys need."""

from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    KV_FORMATS,
    checkpoint_argument,
    count_of_tokens,
    device_option,
    format_option,
    given,
    lang_option,
    memory_option,
    option,
    outputs_of,
    progress_option,
    size_in_bytes,
    text_option,
)
from doctor.cli.output import emit_kvcache, json_on_failure, notice
from doctor.cli.progress import layer_bars
from doctor.core.messages import _


@click.command(
    cls=Command,
    short_help=_("Size of the KV cache, and the bits its keys need."),
    help=_(
        "Memory of the KV cache, and the fewest bits its keys survive.\n\n"
        "The verdict comes from the weights: random states go through each layer's own projections, and the exact "
        "cache."
    ),
)
@checkpoint_argument
@option("--context", default="8192", metavar="TOKENS", help=_("Tokens kept per sequence, as 32768 or 32k."))
@option("--batch", type=int, default=1, help=_("Sequences at a time."))
@memory_option(_("GPU memory for weights and cache, as 24GB: prints the longest context that fits."))
@option("--k-bits", "key_bits", type=int, default=None, help=_("One more row: keys of this width, 2 to 8, or 16."))
@option("--v-bits", "value_bits", type=int, default=None, help=_("The same for values."))
@option(
    "--measure",
    is_flag=True,
    help=_("Also run the model on text with its cache quantized: perplexity of each scheme."),
)
@text_option(_("Text to measure on.  [default: texts of doctor]"))
@option("--rows", type=int, default=None, help=_("Rows to measure, of 512 tokens.  [default: 2]"))
@device_option
@format_option(KV_FORMATS)
@lang_option
@progress_option
def command(
    path: str,
    context: str,
    batch: int,
    memory: str,
    key_bits: int | None,
    value_bits: int | None,
    measure: bool,
    text: Path | None,
    rows: int | None,
    device: str,
    formats: tuple[str, ...],
) -> None:
    """Always exits 0: a cache is a choice, not a defect."""
    from doctor import api

    outputs = outputs_of(formats, known=KV_FORMATS)
    with json_on_failure(outputs):
        with layer_bars() as tick:
            result = api.kvcache(
                path,
                context=count_of_tokens(context) or 0,
                batch=batch,
                measure=measure,
                progress=tick,
                say=notice,
                **given(
                    memory=size_in_bytes(memory),
                    key_bits=key_bits,
                    value_bits=value_bits,
                    text=text,
                    rows=rows,
                    device=device,
                ),
            )
        emit_kvcache(result, outputs)
