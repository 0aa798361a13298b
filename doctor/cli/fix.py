"""`doctor fix`: a fixed copy of a checkpoint, beside it or in its place."""

from pathlib import Path
from typing import Any

import click

from doctor.cli.command import Command
from doctor.cli.options import (
    PATH,
    checkpoint_argument,
    complete_rules,
    lang_option,
    option,
    overwrite_option,
    plan_options,
    progress_option,
    rule_options,
    unsafe_option,
    words,
)
from doctor.cli.output import emit_plain, exit_for, notice
from doctor.cli.progress import byte_bars
from doctor.cli.recipe import asked_recipe, stored_or_asked
from doctor.core.messages import _
from doctor.core.tables import table

OLD_READERS = ("transformers4",)  # entries of generations in rules/tables/readers.toml


@click.command(
    cls=Command,
    help=_(
        "Write a fixed copy of a checkpoint, beside it.\n\n"
        "The copy is checked again with all rules before it appears; the source is never changed."
    ),
)
@checkpoint_argument
@option("-o", "--output", type=PATH, metavar="DIR", help=_("Directory to write; the source is never changed."))
@option(
    "--in-place",
    is_flag=True,
    help=_("Instead of -o: put the fixed copy in CHECKPOINT's place and keep the old one beside it."),
)
@plan_options
@rule_options
@option("--dry-run", is_flag=True, help=_("Show the edits, write nothing."))
@unsafe_option
@option(
    "--only", multiple=True, metavar="CODES", shell_complete=complete_rules, help=_("Only the fixes of these rules.")
)
@option(
    "--from",
    "donor",
    metavar="DIR|ORG/NAME[@REV]",
    help=_("Base model, or a whole copy: lost files and tensors are taken from it, an adapter is merged into it."),
)
@option(
    "--for-readers",
    type=click.Choice(OLD_READERS),
    default=None,
    help=_("Write what these older readers need beside what newer ones read, and judge for them alone."),
)
@option("--copy", is_flag=True, help=_("Copy every unchanged file, never share or link it."))
@option(
    "--link",
    is_flag=True,
    help=_("Make hard links to unchanged files: one file, so a change of one changes both."),
)
@lang_option
@progress_option
@overwrite_option
@click.pass_context
def command(
    ctx: click.Context,
    path: str,
    output: Path | str | None,
    in_place: bool,
    select: tuple[str, ...],
    extend_select: tuple[str, ...],
    ignore: tuple[str, ...],
    dry_run: bool,
    unsafe_fixes: str,
    only: tuple[str, ...],
    for_readers: str | None,
    **flags: Any,
) -> None:
    """flags: those of the recipe, and rules_dirs, fail_on, donor, copy, link and overwrite as api.fix takes them."""
    from doctor import api
    from doctor.checkpoint.directory import Checkpoint
    from doctor.report.plan_text import render_plan

    if dry_run and not in_place and output is None:
        output = "fixed"  # what the diff calls it; nothing is written
    if in_place == (output is not None):
        raise click.UsageError(_("Give -o DIR, or --in-place, and not both."))
    if for_readers:
        reader = table("readers")["generations"][for_readers]
        flags |= {"method": "none", "runtime": reader["runtime"]}
        only, unsafe_fixes = (*only, *reader["rules"]), ",".join(filter(None, (unsafe_fixes, *reader["rules"])))
    if flags["copy"] and flags["link"]:
        raise click.UsageError(_("Give --copy or --link, not both."))
    if in_place and flags["link"]:
        raise click.UsageError(_("--link would make the kept checkpoint change with the fixed one; leave it out."))
    recipe = asked_recipe(flags, ctx.obj)
    for note in api.recover(path):
        notice(note)
    source = Checkpoint.open(path)
    with byte_bars(source.total_bytes, "fetch", "scan", "write", "verify") as tick:
        result = api.fix(
            source,
            output,
            stored_or_asked(ctx, source, recipe),
            unsafe_fixes=words([unsafe_fixes]),
            only=words(only),
            dry_run=dry_run,
            select=words(select),
            extend_select=words(extend_select),
            ignore=words(ignore),
            config=ctx.obj,
            in_place=in_place,
            progress=tick,
            **flags,
        )
    emit_plain(render_plan(result))
    exit_for([result.report])
