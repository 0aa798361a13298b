"""`doctor trust`: allow a configuration file that would not be believed otherwise."""

from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import PATH, complete_path, option
from doctor.cli.output import notice
from doctor.core.messages import _


@click.command(
    cls=Command,
    help=_(
        "Allow a configuration file that a project or a checkpoint brings.\n\n"
        "FILE is a doctor.toml or pyproject.toml. Read it first: its rules are Python that will run, and what it "
        "suppresses is not shown. A change of the file or of that Python takes the permission back."
    ),
)
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...", shell_complete=complete_path)
@option("--forget", is_flag=True, help=_("Take the permission back."))
def command(files: tuple[Path, ...], forget: bool) -> None:
    """Prints one line a file."""
    from doctor.lint import config, trust

    for file in files:
        if forget:
            had = trust.forbid(file)
            notice(_("{file}: no longer trusted", file=file) if had else _("{file}: was not trusted", file=file))
            continue
        found = config.read(file)
        if found is None:
            raise click.UsageError(_("{file}: holds no [tool.doctor].", file=file))
        trust.allow(file)
        notice(_("{file}: trusted until it changes. It sets {what}.", file=file, what=found.contents()))
