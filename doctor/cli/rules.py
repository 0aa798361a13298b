"""`doctor rules`: the list of rules."""

import sys
from importlib.resources import files
from pathlib import Path

import click

from doctor.cli.command import Command
from doctor.cli.options import complete_rules, lang_option, option, rules_dir_option, words
from doctor.core.messages import _
from doctor.lint.config_schema import FILE


@click.command(cls=Command, help=_("List the rules."))
@option("-f", "--format", type=click.Choice(("table", "json", "markdown")), default="table")
@lang_option
@option(
    "--select",
    multiple=True,
    metavar="RULES",
    shell_complete=complete_rules,
    help=_("Only these codes, families, names or certainties."),
)
@rules_dir_option
@option(
    "--schema",
    type=click.Choice(("config", "report")),
    default=None,
    show_default=False,
    help=_("Print a JSON schema instead: of doctor.toml, or of -f json."),
)
def command(format: str, select: tuple[str, ...], rules_dirs: tuple[Path, ...], schema: str | None) -> None:
    """Prints them in the order of their codes."""
    if schema is not None:
        name = FILE if schema == "config" else "schema.json"
        return click.echo(files("doctor.report.formats").joinpath(name).read_text(encoding="utf-8"), nl=False)
    from doctor.lint.engine import load_rules, select_rules
    from doctor.report import pages

    chosen = select_rules(load_rules(rules_dirs), words(select))
    if format == "table":
        from doctor.report.screen import console

        pages.show_rules(chosen, console(sys.stdout))
    else:
        sys.stdout.write(pages.rules_json(chosen) if format == "json" else pages.rules_markdown(chosen))
