"""`doctor check`: whether checkpoints are ready for a recipe."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from doctor.cli import failures, stderr
from doctor.cli.command import Command
from doctor.cli.options import (
    PATH,
    complete_path,
    format_options,
    option,
    outputs_of,
    plan_options,
    progress_option,
    rule_options,
    words,
)
from doctor.cli.output import emit, exit_for, json_on_failure, notice, read_reports
from doctor.cli.progress import byte_bars
from doctor.cli.recipe import asked_recipe, stored_or_asked
from doctor.core.errors import DoctorError
from doctor.core.facts import COSTS
from doctor.core.messages import _, listed
from doctor.core.recipe import Recipe

if TYPE_CHECKING:
    from doctor.lint.engine import Report

PICTURED = ("json", "html", "markdown")  # formats that show figures, for which more is kept of each tensor


@click.command(
    cls=Command,
    help=_(
        "Say whether checkpoints are ready for a recipe. Writes nothing, unless --fix asks for it.\n\n"
        "CHECKPOINT is a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only headers are "
        "fetched."
    ),
)
@click.argument("paths", nargs=-1, metavar="CHECKPOINT...", shell_complete=complete_path)
@plan_options
@rule_options
@option("--fail-on-skipped", is_flag=True, help=_("Exit 1 when a rule could not judge."))
@format_options
@progress_option
@option(
    "--stage",
    type=click.Choice(COSTS),
    default=COSTS[-1],
    help=_("Most expensive evidence to gather: header reads no weights."),
)
@option(
    "--capacity",
    metavar="DIR",
    aliases=("--room",),
    help=_("Also say whether this machine has the memory to quantize, and the disk to write into DIR."),
)
@option(
    "--matrix",
    is_flag=True,
    help=_("Also print methods, group sizes and GPU counts, and what stands in the way of each."),
)
@option("--statistics", is_flag=True, help=_("Print counts by code instead of findings."))
@option("--revision", metavar="REV", help=_("Branch, tag or commit of a Hub repository; org/name@REV says it too."))
@option("--download", is_flag=True, help=_("Fetch a Hub repository's files and check them whole."))
@option(
    "--baseline",
    metavar="REPORT.json|CHECKPOINT",
    help=_("Say what is new, unchanged and gone against it; exit 1 for what is new."),
)
@option(
    "--fix",
    "fix_too",
    is_flag=True,
    help=_("Write a fixed copy to -o DIR, as `doctor fix` does, and report on that."),
)
@option("-o", "--output", type=PATH, metavar="DIR", help=_("With --fix: the directory to write."))
@option("--base", "merge_base", metavar="DIR", help=_("With --adapter: the model that the checkpoint was merged into."))
@option(
    "--adapter", metavar="DIR", help=_("Compare the checkpoint with base plus this LoRA adapter, weight by weight.")
)
@option("--show-settings", is_flag=True, help=_("Print every setting and where it comes from, and check nothing."))
@click.pass_context
def command(
    ctx: click.Context,
    paths: tuple[str, ...],
    select: tuple[str, ...],
    extend_select: tuple[str, ...],
    ignore: tuple[str, ...],
    fail_on_skipped: bool,
    formats: tuple[str, ...],
    concise: bool,
    verbose: bool,
    capacity: str | None,
    matrix: bool,
    statistics: bool,
    revision: str | None,
    download: bool,
    baseline: str | None,
    fix_too: bool,
    output: Path | None,
    merge_base: str | None,
    adapter: str | None,
    show_settings: bool,
    **flags: Any,
) -> None:
    """flags: those of the recipe, and rules_dirs, fail_on and stage as the engine takes them."""
    if not paths and not show_settings:
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    if show_settings:
        from doctor.cli.settings import print_settings

        return print_settings(ctx)
    if fix_too != (output is not None) or (fix_too and len(paths) != 1):
        raise click.UsageError(_("--fix writes one fixed copy: give one CHECKPOINT and -o DIR."))
    if (merge_base is None) != (adapter is None) or (adapter is not None and len(paths) != 1):
        raise click.UsageError(_("--base and --adapter go together, with one CHECKPOINT: the merged one."))
    outputs = outputs_of(formats, concise)
    with json_on_failure(outputs):
        recipe = asked_recipe(flags, ctx.obj)
        options = dict(
            select=words(select), extend_select=words(extend_select), ignore=words(ignore), config=ctx.obj, **flags
        )
        if output is not None:
            report = _fixed(ctx, paths[0], output, recipe, options)
            emit([report], outputs, verbose)
            exit_for([report], fail_on_skipped)
        base = _baseline(ctx, baseline, recipe, options) if baseline else None

        def work(path: str) -> "Report":
            return _checked(
                path,
                recipe,
                (revision, download),
                ctx=ctx,
                baseline=base and base(path),
                matrix=matrix,
                capacity=capacity,
                keep_partial=True,
                figures=any(name in PICTURED for name, _file in outputs),
                merged_from=(merge_base, adapter) if merge_base and adapter else None,
                **options,
            )

        reports, stopped, unread = _until_interrupted(paths, work)
        if not stopped:
            _report_unused_settings(reports)
        if reports:
            emit(reports, [("statistics", "")] if statistics else outputs, verbose, matrix)
        if unread:  # the others are reported all the same
            raise unread
    if stopped:
        _end_interrupted(paths[len(reports) :])
    exit_for(reports, fail_on_skipped)


def _fixed(ctx: click.Context, path: str, output: Path, recipe: Recipe, options: dict[str, Any]) -> "Report":
    """The report on the copy that fix writes."""
    from doctor import api
    from doctor.checkpoint.directory import Checkpoint
    from doctor.report.plan_text import render_plan

    source = Checkpoint.open(path)
    result = api.fix(source, output, stored_or_asked(ctx, source, recipe), **options)
    click.echo(render_plan(result), err=True, nl=False)
    return result.report


def _until_interrupted(
    paths: tuple[str, ...], work: Callable[[str], "Report"]
) -> tuple[list["Report"], bool, DoctorError | None]:
    """(reports up to Ctrl-C, the last one perhaps of a part of its checkpoint; whether it was pressed; the last error).

    What cannot be read does not keep the others from being reported: each error but the last is said at once.
    """
    reports: list[Report] = []
    unread: DoctorError | None = None
    for path in paths:
        try:
            reports.append(work(path))
        except KeyboardInterrupt:
            return reports, True, unread
        except DoctorError as error:
            if len(paths) == 1:
                raise
            if unread is not None:
                stderr.error(unread.message, unread.hint)
            unread = error
            continue
        if reports[-1].summary.get("interrupted"):
            return reports, True, unread
    return reports, False, unread


def _end_interrupted(unread: tuple[str, ...]) -> NoReturn:
    text = _("Interrupted. Not checked: {paths}.", paths=listed(unread)) if unread else failures.INTERRUPTED
    failures.end(text, "", 130)


def _report_unused_settings(reports: list["Report"]) -> None:
    from doctor.lint.suppress import settle

    settle(reports)


def _checked(
    path: str,
    recipe: Recipe,
    remote: tuple[str | None, bool] = (None, False),
    *,
    ctx: click.Context,
    **options: Any,
) -> "Report":
    """The report on one checkpoint. remote: (revision, whether to download) of a repository on the Hub."""
    from doctor import api
    from doctor.checkpoint import hub

    revision, download = remote
    checkpoint = hub.open_checkpoint(path, revision, download, notice=notice)
    recipe, base = stored_or_asked(ctx, checkpoint, recipe), options.get("baseline")
    if base and base.recipe != recipe:
        notice(
            _(
                "{baseline} was made for {there}, this run is for {here}: findings of the recipe may be new.",
                baseline=ctx.params["baseline"],
                there=base.recipe.label(),
                here=recipe.label(),
            )
        )
    if COSTS.index(options.get("stage", COSTS[-1])) >= COSTS.index("values") and not checkpoint.unread:
        say_slow()
    with byte_bars(checkpoint.total_bytes, "reading") as tick:
        return api.check(checkpoint, recipe, progress=partial(tick, "reading"), **options)


@cache
def say_slow() -> None:
    """Once: that weights are read without the C library, where nobody asked for that."""
    from doctor.scan import native

    if native.level() is None and os.environ.get("DOCTOR_NATIVE") != "0":
        notice(
            _(
                "weights are read by NumPy, several times slower: this installation has no C library. A wheel for this "
                "platform has it, or pip with a C compiler builds it."
            )
        )


def _baseline(ctx: click.Context, text: str, recipe: Recipe, options: dict[str, Any]) -> Callable[[str], "Report"]:
    """path -> the report to compare its own with: saved ones are told apart by name, a checkpoint is checked once for
    all.
    """
    if not text.endswith(".json"):
        report = _checked(text, recipe, ctx=ctx, **options)
        return lambda path: report
    saved = read_reports(Path(text))

    def find(path: str) -> "Report":
        name = Path(path).resolve().name
        found = saved if len(saved) == 1 else [r for r in saved if r.checkpoint in (path, name)]
        if len(found) != 1:
            raise DoctorError(
                _(
                    "{file}: holds {n} reports, {found} of them on {name}.",
                    file=text,
                    n=len(saved),
                    found=len(found),
                    name=name,
                ),
                _("Give a report on one checkpoint."),
            )
        return found[0]

    return find
