"""`doctor convert`: a quantized checkpoint in another stored format, without quantizing again."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import PATH, LaterChoice, checkpoint_argument, lang_option, option, overwrite_option
from doctor.cli.output import emit_plain, exit_for
from doctor.cli.progress import byte_bars
from doctor.core.messages import _


class Targets(Iterable[str]):
    """The names of formats, which are known once their package is imported."""

    def __iter__(self) -> Iterator[str]:
        from doctor.quant.conversion import targets

        return iter(targets())


@click.command(
    cls=Command,
    help=_(
        "Write a quantized checkpoint in another stored format, without quantizing again.\n\n"
        "Between formats of integers codes, scales and zero points stay the same; what the other format cannot hold is "
        "refused. bf16 and f16 write plain weights, each rounded once. The source is never changed."
    ),
)
@checkpoint_argument
@option("-o", "--output", type=PATH, metavar="DIR", required=True, help=_("Directory to write."))
@option("--format", "target", type=LaterChoice(Targets()), required=True, help=_("The format to write."))
@option("--copy", is_flag=True, help=_("Copy every unchanged file, never share or link it."))
@lang_option
@overwrite_option
def command(path: str, output: Path, target: str, copy: bool, overwrite: bool) -> None:
    """Prints what was written and what the client said."""
    from doctor import api
    from doctor.checkpoint.directory import Checkpoint
    from doctor.fixing.filesystem import Carry
    from doctor.report.convert_text import render_conversion

    source = Checkpoint.open(path)
    with byte_bars(source.total_bytes, "scan", "write", "verify") as tick:
        done = api.convert(
            source, output, target, carry=Carry.COPY if copy else Carry.AUTO, overwrite=overwrite, progress=tick
        )
    emit_plain(render_conversion(done))
    exit_for([done.report])
