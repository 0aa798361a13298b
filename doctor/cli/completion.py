"""`doctor completion`: the script that completes in a shell."""

import click

from doctor.cli.command import Command
from doctor.core.messages import _


@click.command(
    cls=Command,
    short_help=_("Print the script that completes in a shell."),
    help=_(
        "Print the script that completes commands, options and rule codes in a shell.\n\n"
        "\b\n"
        "bash   doctor completion bash >> ~/.bashrc\n"
        "zsh    doctor completion zsh >> ~/.zshrc      after compinit\n"
        "fish   doctor completion fish > ~/.config/fish/completions/doctor.fish"
    ),
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """The script asks the program itself, so it never grows old."""
    from click.shell_completion import get_completion_class

    writer = get_completion_class(shell)
    assert writer is not None, shell  # the choice above is of shells that click knows
    click.echo(writer(ctx.find_root().command, {}, "doctor", "_DOCTOR_COMPLETE").source())
