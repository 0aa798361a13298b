"""`doctor undo`: what `doctor fix --in-place` replaced, back in its place."""

import click

from doctor.cli.command import Command
from doctor.cli.options import checkpoint_argument
from doctor.core.messages import _
from doctor.locale import catalogue


@click.command(cls=Command, help=_("Put back what `doctor fix --in-place` replaced."))
@checkpoint_argument
def command(path: str) -> None:
    """Prints one line for each thing done."""
    from doctor import api

    for line in api.undo(path):
        click.echo(catalogue.translated(line))
