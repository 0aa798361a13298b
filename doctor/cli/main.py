"""The command line: parses, calls doctor.api, prints, exits. No logic and no import of torch.

Exit 0: nothing at or above --fail-on. 1: findings. 2: the work could not be done (usage, files, or a rule of ours crashed).
130: interrupted. Findings go to stdout; progress and notices to stderr.
"""

import gc
import os
import re
import sys
from functools import partial
from pathlib import Path

import click

from doctor.core import import_stubs
from doctor.core.errors import CheckpointNotReady, DoctorError, MachineError
from doctor.core.facts import COSTS
from doctor.core.recipe import DAMP, DAMP_MAX, METHODS, RUNTIMES, Recipe, parse_runtime
from doctor.core.recipe import FORMATS as OUTPUT_FORMATS
from doctor.core.version import __version__
from doctor.locale import catalogue, rule_pages
from doctor.report import FORMATS

_ENV = "Every option can also be set in the environment: --fail-on as DOCTOR_FAIL_ON. DOCTOR_DEBUG=1 shows tracebacks."
KV_FORMATS = ("full", "json", "markdown", "html")
_BARE = {"--unsafe-fixes": "all"}  # options with an optional value, which is never taken from the next argument


class _Command(click.Command):
    """A command whose options also come from DOCTOR_<OPTION>, and where `--unsafe-fixes PATH` does not swallow the path."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("context_settings", {}).update(
            auto_envvar_prefix="DOCTOR", max_content_width=100, show_default=True
        )
        kwargs.setdefault("epilog", _ENV)
        super().__init__(*args, **kwargs)
        for param in self.params:  # an empty text is no default to speak of
            if isinstance(param, click.Option) and param.default == "":
                param.show_default = False

    def get_help(self, ctx):
        return _help(self, ctx, super().get_help)

    def parse_args(self, ctx, args):
        _overhear(ctx, args)
        end = args.index("--") if "--" in args else len(args)
        known = {o for p in self.params for o in p.opts}
        args = [f"{a}={_BARE[a]}" if i < end and a in _BARE and a in known else a for i, a in enumerate(args)]
        return super().parse_args(ctx, args)


def _help(command, ctx, english) -> str:
    if not catalogue.chinese():
        return english(ctx)
    from doctor.cli import help

    return help.page(command, ctx)


def _overhear(ctx, args) -> None:
    """Set the language before click parses, because --help answers before --lang is read."""
    own = args[: args.index("--")] if "--" in args else args
    asked = [value for flag, value in zip(own, own[1:], strict=False) if flag == "--lang"]
    asked += [a.partition("=")[2] for a in own if a.startswith("--lang=")]
    _speak(ctx, asked[-1] if asked and asked[-1] in catalogue.LANGUAGES else None)


def _speak(ctx, asked) -> None:
    """Until the command ends: the language asked for here, else before the command's name, else the environment's."""
    lang = asked or ctx.meta.get("lang") or os.environ.get("DOCTOR_LANG")
    ctx.with_resource(catalogue.language(lang if lang in catalogue.LANGUAGES else catalogue.from_environment()))


def _spoken(ctx, _param, value):
    """Screens and pages of this command in this language; what machines read is English all the same."""
    if value:
        ctx.meta["lang"] = value
    _speak(ctx, value)


class _Group(click.Group):
    def get_help(self, ctx):
        return _help(self, ctx, super().get_help)

    def parse_args(self, ctx, args):
        _overhear(ctx, args)
        return super().parse_args(ctx, args)


def _version(ctx, _param, value):
    if value and not ctx.resilient_parsing:
        click.echo(
            f"doctor {__version__} (checkpoint-doctor), Python {sys.version.split()[0]}\nNo telemetry: nothing leaves this machine."
        )
        ctx.exit()


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=False,
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.option(
    "--lang",
    type=click.Choice(catalogue.LANGUAGES),
    default=None,
    expose_value=False,
    callback=_spoken,
    help="Language of this page and of the command's screens.  [default: the locale's]",
)
def cli():
    """Finds, explains and cures what makes quantizing a language model fail, then quantizes it.

    \b
    doctor check ckpt/ --for gptq --tp 2       look, write nothing
    doctor fix ckpt/ -o fixed/                 write a cured copy beside it
    doctor quantize fixed/ -o q4/              check, calibrate, quantize, check again
    doctor explain "Hessian is not invertible" what an error points to
    """


def _words(values) -> tuple[str, ...]:
    return tuple(w for value in values for w in value.replace(",", " ").split())


def _patterns(values) -> tuple[str, ...]:
    """Like _words, but a comma or blank inside braces belongs to its pattern: {q,k}_proj is one."""
    return tuple(p for value in values for p in re.split(r"[,\s]+(?![^{}]*\})", value) if p)


def _options(*decorators):
    def wrap(function):
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return wrap


def _configured(ctx, _param, value):
    """Read the configuration before any other option, whose defaults it gives."""
    from doctor.lint import config

    if ctx.resilient_parsing:
        return
    if value == "none":
        ctx.obj = config.Config(reads_checkpoint=False)
    else:
        ctx.obj = config.read(Path(value)) if value else config.load()
    if ctx.obj is None:
        raise DoctorError(
            f"{value}: holds no [tool.doctor].", "Give a doctor.toml, or a pyproject.toml with that table."
        )
    runtime = "==".join(filter(None, map(ctx.obj.recipe_values.get, ("runtime", "runtime_version"))))
    ctx.default_map = {**ctx.obj.recipe_values, **_given(runtime=runtime or None, fail_on=ctx.obj.fail_on)}


def _complete_rules(_ctx, _param, incomplete):
    """Codes, names and family letters of rules that go on from the last word of a comma list."""
    from click.shell_completion import CompletionItem

    from doctor.lint.engine import load_rules

    before, comma, word = incomplete.rpartition(",")
    rules = load_rules()
    return [
        CompletionItem(before + comma + found, help=r.title)
        for r in rules
        for found in (r.code, r.name)
        if word and found.lower().startswith(word.lower()) or (not word and found == r.code)
    ]


def _complete_path(_ctx, _param, incomplete):
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


lang_option = click.option(
    "--lang",
    type=click.Choice(catalogue.LANGUAGES),
    default=None,
    expose_value=False,
    callback=_spoken,
    show_default=False,
    help="Language of screens, Markdown and HTML.  [default: the locale's]",
)
_PATH = click.Path(path_type=Path)
plan_options = _options(
    click.option(
        "--for",
        "--method",
        "method",
        type=click.Choice(METHODS),
        default="gptq",
        help="Quantization method of the plan.",
    ),
    click.option("--bits", type=int, default=4, help="Bits per weight: 2, 3, 4 or 8."),
    click.option("--group-size", type=int, default=128, help="in_features that share a scale; -1 for whole rows."),
    click.option(
        "--sym/--asym", default=None, help="Symmetric or asymmetric grid; asymmetric for awq, else symmetric."
    ),
    click.option(
        "--tp", "--tensor-parallel-size", "tp", type=int, default=1, help="GPUs that share each linear at serving."
    ),
    click.option(
        "--runtime", default="", metavar="NAME[==VERSION]", help=f"Where it will be served: {', '.join(RUNTIMES)}."
    ),
    click.option(
        "--config",
        is_eager=True,
        expose_value=False,
        callback=_configured,
        metavar="FILE",
        help="This configuration; none for no file at all.  [default: the nearest doctor.toml or pyproject.toml]",
    ),
)
rule_options = _options(
    click.option(
        "--select",
        multiple=True,
        metavar="RULES",
        shell_complete=_complete_rules,
        help="Only these codes, families (G, W2), names or certainties; commas or repeated.",
    ),
    click.option(
        "--extend-select",
        multiple=True,
        metavar="RULES",
        shell_complete=_complete_rules,
        help="These too, beside what is selected already.",
    ),
    click.option("--ignore", multiple=True, metavar="RULES", shell_complete=_complete_rules, help="All but these."),
    click.option(
        "--rules",
        "rules_dirs",
        multiple=True,
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="Also load the rule files of DIR. They are Python: load only what you trust.",
    ),
    click.option(
        "--fail-on",
        type=click.Choice(("error", "warning", "info", "never")),
        default="error",
        help="Least severity for exit code 1.",
    ),
)
format_options = _options(
    click.option(
        "-f",
        "--format",
        "formats",
        multiple=True,
        metavar="FORMAT[:FILE]",
        help=f"{', '.join(FORMATS)}; repeatable, to stdout or to a FILE.  [default: full]",
    ),
    click.option("--concise", is_flag=True, help="Short for -f concise."),
    click.option("-v", "--verbose", is_flag=True, help="Also list every rule, and why it was skipped."),
    lang_option,
)


def _recipe(method, bits, group_size, sym, tp, runtime, config=None, **more) -> Recipe:
    """The plan of the flags; fields that the command has no flag for come from the configuration."""
    name, version = parse_runtime(runtime)
    values = dict(config.recipe_values) if config else {}
    return Recipe(
        **{
            **values,
            "method": method,
            "bits": bits,
            "group_size": group_size,
            "sym": sym,
            "tp": tp,
            "runtime": name,
            "runtime_version": version,
            **more,
        }
    )


def _outputs(formats, concise, known=FORMATS) -> list[tuple[str, str]]:
    """[(format, file or "")]; at most one of them to stdout."""
    chosen = [tuple(f.partition(":")[::2]) for f in formats]
    if concise:
        chosen.append(("concise", ""))
    for name, _ in chosen:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}.", param_hint="'-f'")
    if sum(not file for _, file in chosen) > 1:
        raise click.UsageError("Only one format can go to stdout; give the others a file, as in -f html:report.html.")
    return chosen or [("full", "")]


@cli.command(cls=_Command)
@click.argument("paths", nargs=-1, required=True, metavar="CHECKPOINT...", shell_complete=_complete_path)
@plan_options
@rule_options
@click.option("--fail-on-skipped", is_flag=True, help="Exit 1 when a rule could not judge.")
@format_options
@click.option(
    "--stage",
    type=click.Choice(COSTS),
    default=COSTS[-1],
    help="Most expensive evidence to gather: header reads no weights.",
)
@click.option(
    "--room",
    metavar="DIR",
    help="Also say whether this machine has the memory to quantize, and the disk to write into DIR.",
)
@click.option(
    "--matrix", is_flag=True, help="Also print methods, group sizes and GPU counts, and what stands in the way of each."
)
@click.option("--statistics", is_flag=True, help="Print counts by code instead of findings.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository; org/name@REV says it too.")
@click.option("--download", is_flag=True, help="Fetch a Hub repository's files and check them whole.")
@click.option(
    "--baseline",
    metavar="REPORT.json|CHECKPOINT",
    help="Say what is new, unchanged and gone against it; exit 1 for what is new.",
)
@click.option(
    "--fix", "fix_too", is_flag=True, help="Write a cured copy to -o DIR, as `doctor fix` does, and report on that."
)
@click.option("-o", "--output", "output", type=_PATH, metavar="DIR", help="With --fix: the directory to write.")
@click.option("--show-settings", is_flag=True, help="Print every setting and where it comes from, and check nothing.")
@click.pass_context
def check(
    ctx,
    paths,
    method,
    bits,
    group_size,
    sym,
    tp,
    runtime,
    select,
    extend_select,
    ignore,
    rules_dirs,
    fail_on,
    fail_on_skipped,
    formats,
    concise,
    verbose,
    stage,
    room,
    matrix,
    statistics,
    revision,
    download,
    baseline,
    fix_too,
    output,
    show_settings,
):
    """Say whether checkpoints are ready for a plan. Writes nothing, unless --fix asks for it.

    CHECKPOINT is a directory, a .safetensors file, or org/name[@revision] on the Hub, of which only headers are fetched.
    """
    if show_settings:
        return _show_settings(ctx)
    if fix_too != (output is not None) or (fix_too and len(paths) != 1):
        raise click.UsageError("--fix writes one cured copy: give one CHECKPOINT and -o DIR.")
    outputs = _outputs(formats, concise)
    with _json_on_failure(outputs):
        recipe = _recipe(method, bits, group_size, sym, tp, runtime, ctx.obj)
        options = dict(
            select=_words(select),
            extend_select=_words(extend_select),
            ignore=_words(ignore),
            stage=stage,
            fail_on=fail_on,
            rules_dirs=rules_dirs,
            config=ctx.obj,
        )
        if fix_too:
            from doctor import api
            from doctor.checkpoint.directory import Checkpoint
            from doctor.report.plan_text import render_plan

            source = Checkpoint.open(paths[0])
            result = api.fix(source, output, _own_plan(ctx, source, recipe), **options)
            click.echo(render_plan(result), err=True, nl=False)
            _emit([result.report], outputs, verbose)
            _exit([result.report], fail_on_skipped)
        base = _baseline(ctx, baseline, recipe, options) if baseline else None
        reports, stopped = _until_interrupted(
            paths,
            lambda path: _checked(
                path,
                recipe,
                (revision, download),
                ctx=ctx,
                baseline=base and base(path),
                matrix=matrix,
                room=room,
                keep_partial=True,
                **options,
                pictures=any(name in ("json", "html", "markdown") for name, _ in outputs),
            ),
        )
        if not stopped:
            _settled(reports)
        _emit(reports, [("statistics", "")] if statistics else outputs, verbose, matrix)
    if stopped:
        _fail("Interrupted." + "".join(f" Not looked at: {path}." for path in paths[len(reports) :]), "", 130)
    _exit(reports, fail_on_skipped)


def _until_interrupted(paths, work) -> tuple[list, bool]:
    """Reports up to Ctrl-C, the last one perhaps of a part of its checkpoint; and whether it was pressed."""
    reports = []
    for path in paths:
        try:
            reports.append(work(path))
        except KeyboardInterrupt:
            return reports, True
        if reports[-1].summary.get("interrupted"):
            return reports, True
    return reports, False


def _settled(reports) -> None:
    from doctor.lint.suppress import settle

    settle(reports)


def _own_plan(ctx, checkpoint, recipe: Recipe) -> Recipe:
    """The plan a quantized checkpoint states for itself, unless flags, environment or configuration ask for another; that is said."""
    from click.core import ParameterSource

    from doctor.plan.groups import STATED, stored_recipe

    stored = stored_recipe(checkpoint, recipe)
    if all(ctx.get_parameter_source(name) is ParameterSource.DEFAULT for name in STATED):
        return stored
    if any(getattr(stored, name) != getattr(recipe, name) for name in STATED):
        click.echo(
            catalogue.say(
                "{name} states {stored} of itself; judged against {asked}, which was asked for",
                name=checkpoint.name,
                stored=_grid(stored),
                asked=_grid(recipe),
            ),
            err=True,
        )
    return recipe


def _grid(recipe: Recipe) -> str:
    return f"{recipe.label()} {'sym' if recipe.sym else 'asym'}"


def _checked(path: str, recipe: Recipe, remote=(None, False), *, ctx, **options):
    from doctor import api
    from doctor.checkpoint import hub

    checkpoint = hub.open_checkpoint(path, *remote, notice=lambda line: click.echo(line, err=True))
    recipe, base = _own_plan(ctx, checkpoint, recipe), options.get("baseline")
    if base and base.recipe != recipe:
        click.echo(
            f"{ctx.params['baseline']} was made for {base.recipe.label()}, this run is for {recipe.label()}: findings of the plan may be new.",
            err=True,
        )
    with _progress(checkpoint.total_bytes, "reading") as tick:
        return api.check(checkpoint, recipe, progress=partial(tick, "reading"), **options)


def _baseline(ctx, text: str, recipe: Recipe, options: dict):
    """path -> the report to compare its own with: saved ones are told apart by name, a checkpoint is checked once for all."""
    if not text.endswith(".json"):
        report = _checked(text, recipe, ctx=ctx, **options)
        return lambda path: report
    saved = _read_reports(Path(text))

    def find(path: str):
        name = Path(path).resolve().name
        found = saved if len(saved) == 1 else [r for r in saved if r.checkpoint in (path, name)]
        if len(found) != 1:
            raise DoctorError(
                f"{text}: holds {len(saved)} reports, {len(found)} of them on {name}.",
                "Give a report on one checkpoint.",
            )
        return found[0]

    return find


def _show_settings(ctx) -> None:
    """Each setting, its value and who had the last word."""
    from click.core import ParameterSource

    from doctor.report.formats.terminal import console
    from doctor.report.pages import show_settings

    keys = {
        "fail_on": "fail-on",
        "rules_dirs": "rules",
        "select": "select",
        "extend_select": "extend-select",
        "ignore": "ignore",
        "stage": "stage",
    }
    rows = []
    for param in ctx.command.params:
        key = keys.get(param.name) or (f"recipe.{param.name}" if param.name in Recipe.__dataclass_fields__ else None)
        if key is None:
            continue
        source = ctx.get_parameter_source(param.name)
        origin = {
            ParameterSource.COMMANDLINE: param.opts[0],
            ParameterSource.ENVIRONMENT: f"DOCTOR_{param.name.upper()}",
            ParameterSource.DEFAULT_MAP: ctx.obj.origin(key),
        }.get(source, "built in")
        filed = {
            "rules": ctx.obj.rules_dirs,
            "select": ctx.obj.selection.select,
            "extend-select": ctx.obj.selection.extend_select,
            "ignore": ctx.obj.selection.ignore,
        }.get(key, ())
        if filed:
            rows.append((key, filed, ctx.obj.origin(key)))
        if not filed or origin != "built in":
            rows.append((key, ctx.params[param.name], origin))
    shown = {key for key, _, _ in rows}
    rows += [
        (f"recipe.{k}", v, ctx.obj.origin(f"recipe.{k}"))
        for k, v in ctx.obj.recipe_values.items()
        if f"recipe.{k}" not in shown and k != "runtime_version"
    ]
    rows += [(f"suppress {s.code}", s.where or "every place", s.origin) for s in ctx.obj.suppress]
    show_settings(rows, ctx.obj.file, console(sys.stdout))


def _exit(reports, fail_on_skipped=False):
    if any(r.crashed for r in reports):
        sys.exit(2)
    silent = fail_on_skipped and any(run.status == "skipped" for r in reports for run in r.runs)
    sys.exit(1 if silent or not all(r.ok for r in reports) else 0)


class _json_on_failure:
    """Inside it an error is also written as a JSON document wherever -f json asked for one."""

    def __init__(self, outputs):
        self.outputs = outputs

    def __enter__(self):
        return self

    def __exit__(self, _kind, error, _trace):
        if not isinstance(error, Exception) or isinstance(error, click.ClickException):
            return
        from doctor.report.formats.json_report import failure

        for name, file in self.outputs:
            if name == "json":
                _write(failure(error), file)


def _emit(reports, outputs, verbose=False, matrix=False) -> None:
    """Print or write each format. The screen goes through rich, so that it knows the terminal's width and colours."""
    from doctor.report import render

    for name, file in outputs:
        if name == "full" and not file:
            from doctor.report.formats.terminal import console, show

            show(reports, console(sys.stdout), verbose, matrix)
        elif name == "statistics":
            from doctor.report.formats.terminal import console, show_statistics

            for report in reports:
                show_statistics(report, console(sys.stdout))
        else:
            _write(render(name, reports, catalogue.current()), file)


def _write(text: str, file: str) -> None:
    if not file:
        sys.stdout.write(text)
        return
    try:
        with open(file, "a" if file == os.environ.get("GITHUB_STEP_SUMMARY") else "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise MachineError(f"{file}: {error.strerror}.", "Give a file that can be written.") from None
    click.echo(catalogue.say("Wrote {file}", file=file), err=True)


def _watched() -> bool:
    """Whether a person looks at stderr, so that a bar is of use."""
    return sys.stderr.isatty() and not (
        os.environ.get("CI") or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") or os.environ.get("TERM") == "dumb"
    )


class _steps:
    """A bar on stderr for each phase of a run through a model's blocks, where a person watches; elsewhere nothing.

    Gives the function to call with a phase, the blocks done and the blocks in all.
    """

    def __enter__(self):
        self.bar, self.tasks = None, {}
        if not _watched():
            return lambda phase, done, total: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.bar.start()

        def tick(phase: str, done: int, total: int) -> None:
            if phase not in self.tasks:
                self.tasks[phase] = self.bar.add_task(catalogue.say(phase))
            self.bar.update(self.tasks[phase], completed=done, total=total)

        return tick

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()


class _progress:
    """Bars in bytes on stderr, one for each phase, where a person watches; elsewhere nothing.

    Gives the function to call with a phase and the size of each chunk of it, from any thread.
    """

    def __init__(self, total: int, *phases: str):
        self.total, self.phases, self.bar = total, phases, None

    def __enter__(self):
        if not _watched() or self.total < 64 << 20:
            return lambda phase, n: None
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        tasks = {phase: self.bar.add_task(phase, total=self.total, visible=False) for phase in self.phases}
        self.bar.start()

        def tick(phase: str, n: int) -> None:
            if phase in tasks:
                self.bar.update(tasks[phase], advance=n, visible=True)

        return tick

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()


def _given(**options) -> dict:
    """Options that were given; the others keep the default of the function that is called."""
    return {k: v for k, v in options.items() if v is not None}


out_option = click.option(
    "-o", "--output", "output", type=_PATH, required=True, metavar="DIR", help="Directory to write; must not exist."
)
device_option = click.option("--device", default="cpu", metavar="NAME", help="Where to compute: cpu, cuda or cuda:1.")
unsafe_option = click.option(
    "--unsafe-fixes",
    default="",
    metavar="[=CODES]",
    help="Also fixes that change numbers or shapes; =CODES only those, and those that go by name only.",
)


@cli.command(cls=_Command)
@click.argument("path", metavar="CHECKPOINT", shell_complete=_complete_path)
@click.option(
    "-o", "--output", "output", type=_PATH, metavar="DIR", help="Directory to write; the source is never changed."
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Instead of -o: put the cured copy in CHECKPOINT's place and keep the old one beside it.",
)
@plan_options
@rule_options
@click.option("--dry-run", is_flag=True, help="Show the edits, write nothing.")
@unsafe_option
@click.option(
    "--only", multiple=True, metavar="CODES", shell_complete=_complete_rules, help="Only the fixes of these rules."
)
@click.option(
    "--from",
    "base",
    metavar="DIR|ORG/NAME[@REV]",
    help="Base model, or a whole copy: lost files and tensors are taken from it, an adapter is merged into it.",
)
@click.option("--copy", is_flag=True, help="Copy unchanged shards instead of linking them.")
@lang_option
@click.option("--overwrite", is_flag=True, help="Replace an existing DIR.")
@click.pass_context
def fix(
    ctx,
    path,
    output,
    in_place,
    method,
    bits,
    group_size,
    sym,
    tp,
    runtime,
    select,
    extend_select,
    ignore,
    rules_dirs,
    fail_on,
    dry_run,
    unsafe_fixes,
    only,
    base,
    copy,
    overwrite,
):
    """Write a cured copy of a checkpoint, beside it.

    The copy is checked again with all rules before it appears; the source is never changed.
    """
    from doctor import api
    from doctor.checkpoint.directory import Checkpoint
    from doctor.report.plan_text import render_plan

    if dry_run and not in_place and output is None:
        output = "fixed"  # what the diff calls it; nothing is written
    if in_place == (output is not None):
        raise click.UsageError("Give -o DIR, or --in-place, and not both.")
    recipe = _recipe(method, bits, group_size, sym, tp, runtime, ctx.obj)
    for note in api.recover(path):
        click.echo(note, err=True)
    source = Checkpoint.open(path)
    with _progress(source.total_bytes, "fetch", "scan", "write", "verify") as tick:
        result = api.fix(
            source,
            output,
            _own_plan(ctx, source, recipe),
            unsafe_fixes=_words([unsafe_fixes]),
            only=_words(only),
            dry_run=dry_run,
            copy=copy,
            overwrite=overwrite,
            select=_words(select),
            extend_select=_words(extend_select),
            ignore=_words(ignore),
            rules_dirs=rules_dirs,
            fail_on=fail_on,
            config=ctx.obj,
            base=base,
            in_place=in_place,
            progress=tick,
        )
    click.echo(render_plan(result), nl=False)
    _exit([result.report])


@cli.command(cls=_Command)
@click.argument("path", metavar="CHECKPOINT", shell_complete=_complete_path)
def undo(path):
    """Put back what `doctor fix --in-place` replaced."""
    from doctor import api

    for line in api.undo(path):
        click.echo(line)


@cli.command(cls=_Command)
@click.argument("path", metavar="CHECKPOINT", shell_complete=_complete_path)
@out_option
@plan_options
@click.option(
    "--act-order/--no-act-order", default=True, help="Columns in order of importance; groups stay as they are."
)
@click.option("--mse/--no-mse", default=True, help="Search each group's scale for the least squared error.")
@click.option(
    "--format",
    "format",
    type=click.Choice(OUTPUT_FORMATS),
    default=None,
    help="File format.  [default: the method's own]",
)
@click.option("--damp", type=float, default=DAMP, help="Share of the mean diagonal added to each Hessian.")
@click.option("--damp-max", type=float, default=DAMP_MAX, help="Most that a retry may raise it to.")
@click.option(
    "--calibration",
    metavar="FILE|ORG/NAME",
    default=None,
    show_default=False,
    help="Text, JSONL, Parquet or a dataset on the Hub.  [default: Python's documentation and text the model writes; yours is better]",
)
@click.option("--rows", type=int, default=None, help="Calibration rows.")
@click.option("--max-seq-length", type=int, default=None, help="Tokens per row, at most.")
@click.option("--seed", type=int, default=0)
@click.option("--keep", multiple=True, metavar="PATTERN", help="Linears left in 16 bits; repeatable.")
@click.option(
    "--bits-for",
    multiple=True,
    metavar="PATTERN=BITS",
    help="Other bits for some linears, as '{0,1}.*down_proj=8'; repeatable. In the GPTQ format transformers does not read them.",
)
@click.option("--fix", "fix", is_flag=True, help="Apply safe fixes first, without writing the cured copy.")
@unsafe_option
@click.option("--memory", default="", metavar="SIZE", help="Most memory to use, as 24GB.  [default: what is free]")
@click.option(
    "--device",
    default="cpu",
    metavar="NAME",
    help="Where to compute: cpu, cuda, cuda:1; under torchrun, cuda is one GPU a process.",
)
@click.option(
    "--plan", "plan_only", is_flag=True, help="Only print the memory and disk that it takes, from headers alone."
)
@click.option(
    "--preflight",
    is_flag=True,
    help="Quantize the first and last block only, write nothing: would it fail, how long would it take?",
)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DIR.")
@click.option(
    "-f",
    "--report",
    "formats",
    multiple=True,
    metavar="FORMAT[:FILE]",
    help=f"{', '.join(FORMATS)}; repeatable, to stdout or to a FILE.  [default: full]",
)
@lang_option
def quantize(
    path,
    output,
    method,
    bits,
    group_size,
    sym,
    tp,
    runtime,
    act_order,
    mse,
    format,
    damp,
    damp_max,
    calibration,
    rows,
    max_seq_length,
    seed,
    keep,
    bits_for,
    fix,
    unsafe_fixes,
    memory,
    device,
    plan_only,
    preflight,
    resume,
    overwrite,
    formats,
):
    """Check, calibrate, quantize and check the result.

    `torchrun --nproc-per-node N -m doctor quantize …` shares the work among N processes.
    """
    from doctor import api

    outputs = _outputs(formats, False)
    with _json_on_failure(outputs):
        recipe = _recipe(
            method,
            bits,
            group_size,
            sym,
            tp,
            runtime,
            act_order=act_order,
            mse=mse,
            damp=damp,
            damp_max=damp_max,
            format=format or "",
            seed=seed,
            keep=_patterns(keep),
            bits_for=bits_for,
        )
        if plan_only:
            return _forecast(
                api.plan_quantize(
                    path,
                    output,
                    recipe,
                    **_given(rows=rows, max_seq_length=max_seq_length, memory=_bytes(memory), calibration=calibration),
                )
            )
        more = {"preflight": True} if preflight else {}
        result = api.quantize(
            path,
            output,
            recipe,
            fix=fix,
            unsafe_fixes=_words([unsafe_fixes]),
            resume=resume,
            overwrite=overwrite,
            progress=lambda text: click.echo(catalogue.known(text), err=True),
            **more,
            **_given(
                calibration=calibration,
                rows=rows,
                max_seq_length=max_seq_length,
                memory=_bytes(memory),
                device=None if device == "cpu" else device,
            ),
        )
        if int(os.environ.get("RANK", "0")):  # under torchrun, rank 0 speaks for all
            _exit([result.report])
        _emit([result.report], outputs)
    if result.forecast is not None:
        _forecast(result.forecast, result.report)
    click.echo(
        catalogue.say("Wrote {file}", file=output) if result.output else catalogue.say("Nothing was written."), err=True
    )
    _exit([result.report])


def _forecast(forecast, report=None) -> None:
    """Print it and exit: 1 where the run would fail."""
    click.echo("\n".join(map(catalogue.known, forecast.lines())))
    sys.exit(1 if forecast.problems or (report is not None and not report.ok) else 0)


@cli.command(cls=_Command)
@click.argument("original", metavar="ORIGINAL", shell_complete=_complete_path)
@click.argument("quantized", metavar="QUANTIZED", shell_complete=_complete_path)
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="Text to compare on.  [default: texts of doctor]"
)
@click.option("--context", type=int, default=None, help="Tokens of a row.  [default: 512]")
@click.option("--rows", type=int, default=None, help="Rows, at most; they do not overlap.  [default: 24]")
@click.option(
    "--memory",
    default="",
    metavar="SIZE",
    help="Memory for whole models, as 24GB: greedy replies need them.  [default: half of what is free]",
)
@device_option
@format_options
def verify(original, quantized, text, context, rows, memory, device, formats, concise, verbose):
    """Compare a quantized model with its original.

    Measures perplexity, divergence of the next-token distributions, and collapse of greedy replies.
    """
    from doctor import api

    outputs = _outputs(formats, concise)
    with _json_on_failure(outputs):
        with _steps() as tick:
            report = api.verify(
                original,
                quantized,
                progress=partial(tick, "compare"),
                **_given(
                    text=text,
                    context=context,
                    rows=rows,
                    memory=_bytes(memory),
                    device=None if device == "cpu" else device,
                ),
            )
        _emit([report], outputs, verbose)
    _exit([report])


@cli.command(cls=_Command, short_help="Size of the key/value cache, and the bits its keys need.")
@click.argument("path", metavar="CHECKPOINT", shell_complete=_complete_path)
@click.option("--context", type=int, default=8192, help="Tokens kept per sequence.")
@click.option("--batch", type=int, default=1, help="Sequences at a time.")
@click.option(
    "--memory",
    default="",
    metavar="SIZE",
    help="GPU memory for weights and cache, as 24GB: prints the longest context that fits.",
)
@click.option("--k-bits", "key_bits", type=int, default=None, help="One more row: keys of this width, 2 to 8, or 16.")
@click.option("--v-bits", "value_bits", type=int, default=None, help="The same for values.")
@click.option(
    "--measure", is_flag=True, help="Also run the model on text with its cache quantized: perplexity of each scheme."
)
@click.option(
    "--text", type=click.Path(path_type=Path), metavar="FILE", help="Text to measure on.  [default: texts of doctor]"
)
@click.option("--rows", type=int, default=None, help="Rows to measure, of 512 tokens.  [default: 2]")
@device_option
@click.option(
    "-f",
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT[:FILE]",
    help=f"{', '.join(KV_FORMATS)}; repeatable, to stdout or to a FILE.  [default: full]",
)
@lang_option
def kvcache(path, context, batch, memory, key_bits, value_bits, measure, text, rows, device, formats):
    """Memory of the key/value cache, and the fewest bits its keys survive.

    The verdict comes from the weights: random states go through each layer's own projections, and the exact cache.
    """
    from doctor import api

    outputs = _outputs(formats, False, KV_FORMATS)
    with _json_on_failure(outputs):
        with _steps() as tick:
            result = api.kvcache(
                path,
                context=context,
                batch=batch,
                measure=measure,
                progress=tick,
                **_given(
                    memory=_bytes(memory),
                    key_bits=key_bits,
                    value_bits=value_bits,
                    text=text,
                    rows=rows,
                    device=None if device == "cpu" else device,
                ),
            )
        _emit_kvcache(result, outputs)


def _emit_kvcache(result, outputs) -> None:
    from doctor.report.formats.terminal import console
    from doctor.report.kv_text import kvcache_html, kvcache_json, kvcache_markdown, render_kvcache, show_kvcache

    writers = {"full": render_kvcache, "json": kvcache_json, "markdown": kvcache_markdown, "html": kvcache_html}
    for name, file in outputs:
        if name == "full" and not file:
            show_kvcache(result, console(sys.stdout))
        else:
            _write(writers[name](result), file)


def _bytes(text: str) -> int | None:
    """`24GB`, `24GiB`, `24G` or a number of bytes; None for none."""
    import re

    if not text:
        return None
    match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", text, re.I)
    if not match:
        raise click.BadParameter(f"{text!r} is not a size; write 24GB or 24GiB.", param_hint="'--memory'")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


@cli.command(cls=_Command)
@click.argument("what", nargs=-1, required=True, metavar="CODE | NAME | ERROR TEXT | -", shell_complete=_complete_rules)
@click.option("-f", "--format", "format", type=click.Choice(("text", "markdown")), default="text")
@lang_option
def explain(what, format):
    """A rule's page, or what a pasted error points to.

    - reads the error from stdin: `python quantize.py 2>&1 | tail -1 | doctor explain -`.
    """
    from doctor.lint import explain as search
    from doctor.lint.suppress import OWN_RULES
    from doctor.lint.engine import load_rules
    from doctor.report import pages
    from doctor.report.formats.terminal import console

    text = sys.stdin.read() if what == ("-",) else " ".join(what)
    rules = [*load_rules(), *OWN_RULES]
    entry = search.find(text, rules)
    if entry is not None and format == "markdown":
        sys.stdout.write(rule_pages.markdown(entry, catalogue.current()))
    elif entry is not None:
        pages.show_page(entry, rules, console(sys.stdout))
    else:
        matches = search.search(text, rules)
        pages.show_matches(text, matches, search.nearest(text, rules), console(sys.stdout))
        sys.exit(0 if matches or search.elsewhere(text) else 1)


@cli.command(cls=_Command)
@click.option("-f", "--format", "format", type=click.Choice(("table", "json", "markdown")), default="table")
@lang_option
@click.option(
    "--select",
    multiple=True,
    metavar="RULES",
    shell_complete=_complete_rules,
    help="Only these codes, families, names or certainties.",
)
@click.option(
    "--rules", "rules_dirs", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR"
)
def rules(format, select, rules_dirs):
    """List the rules."""
    from doctor.lint.engine import load_rules, select_rules
    from doctor.report import pages

    chosen = select_rules(load_rules(rules_dirs), _words(select))
    if format == "table":
        from doctor.report.formats.terminal import console

        pages.show_rules(chosen, console(sys.stdout))
    else:
        sys.stdout.write(pages.rules_json(chosen) if format == "json" else pages.rules_markdown(chosen))


@cli.command(cls=_Command)
@click.argument("report", type=click.Path(path_type=Path), metavar="REPORT.json")
@format_options
def render(report, formats, concise, verbose):
    """Render a saved report in another format.

    Needs only the JSON that `doctor check -f json:REPORT.json` wrote (or quantize, verify, kvcache), not the checkpoint.
    """
    text = _text_of(report)
    cache = _kvcache_of(text)
    if cache is not None:
        return _emit_kvcache(cache, _outputs(formats, concise, KV_FORMATS))
    from doctor.report.formats.json_report import read

    _emit(read(text), _outputs(formats, concise), verbose)


@cli.command(cls=_Command, short_help="Print the script that completes in a shell.")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell):
    """Print the script that completes commands, options and rule codes in a shell.

    \b
    bash   doctor completion bash >> ~/.bashrc
    zsh    doctor completion zsh >> ~/.zshrc      after compinit
    fish   doctor completion fish > ~/.config/fish/completions/doctor.fish
    """
    from click.shell_completion import get_completion_class

    click.echo(get_completion_class(shell)(cli, {}, "doctor", "_DOCTOR_COMPLETE").source())


def _read_reports(path: Path) -> list:
    """Reports of a JSON file, - for stdin. Raises DoctorError."""
    from doctor.report.formats.json_report import read

    return read(_text_of(path))


def _kvcache_of(text: str):
    """The KvReport of a JSON text, None for a report of another kind: only then is the evaluation imported, and torch with it."""
    if '"doctor.kvcache/' not in text[:200]:
        return None
    import json

    from doctor.evaluate.kvcache.study import from_dict

    try:
        return from_dict(json.loads(text))
    except ValueError as error:
        raise DoctorError(
            f"not JSON: {error}.", "Make a report with `doctor kvcache CHECKPOINT -f json:kv.json`."
        ) from None


def _text_of(path: Path) -> str:
    """A report's text, - for stdin. Raises MachineError."""
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(
            f"{path}: {getattr(error, 'strerror', None) or error}.", "Give a report made with -f json:FILE."
        ) from None


def main(args: list[str] | None = None) -> None:
    """The entry point of both scripts: errors for the user without a traceback, and the exit code."""
    # A few objects for each tensor live to the end of a check; looking through them for garbage again and again took a fifth of it.
    gc.set_threshold(100_000, 20, 20)
    if args is None:  # a process of doctor's own
        import_stubs.install()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ✓ must not end the run
    try:
        cli.main(args, prog_name="doctor", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("Interrupted.", "", 130)
    except KeyboardInterrupt:
        _fail("Interrupted.", "", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except BrokenPipeError:  # `doctor check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except CheckpointNotReady as error:
        _fail(error.message, error.hint, 1)
    except DoctorError as error:
        _fail(error.message, error.hint, 2)
    except (OSError, MemoryError) as error:
        _fail(f"{type(error).__name__}: {error}", "", 2)
    except Exception as error:
        _fail(
            f"{type(error).__name__}: {error}",
            "This is a defect of doctor: please report it, with the output of DOCTOR_DEBUG=1.",
            2,
        )


def _fail(message: str, hint: str, code: int) -> None:
    if os.environ.get("DOCTOR_DEBUG") == "1" and sys.exc_info()[0] is not None and code != 130:
        import traceback

        traceback.print_exc()
    click.echo(f"Error: {message}" if code != 130 else message, err=True)
    if hint:
        click.echo(f"Hint: {hint}", err=True)
    sys.exit(code)
