"""Options that several commands share, and how their values are read."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from doctor.cli import stderr
from doctor.cli.command import Option, take_language
from doctor.core.errors import DoctorError
from doctor.core.messages import Message, _, listed
from doctor.core.near import nearest
from doctor.core.recipe import GOALS, METHODS, RUNTIMES
from doctor.formats.schemes import scheme_named
from doctor.locale import catalogue
from doctor.locale.catalogue import translated
from doctor.report import FORMATS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

KV_FORMATS = ("full", "json", "markdown", "html")  # of commands whose result is no list of findings
_SHORT = {"md": "markdown"}
PATH = click.Path(path_type=Path)
OTHER_GOALS = tuple(goal for goal in GOALS[1:] if goal != "quantize")  # what --for takes beside methods
LEAST_PLAIN = 1 << 20  # a smaller number without a unit was not meant as bytes
option = partial(click.option, cls=Option)


def together(*decorators: Callable) -> Callable:
    """One decorator of several, in the order in which a help page lists them."""

    def wrap(function: Callable) -> Callable:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return wrap


class NearChoice(click.Choice):
    """A choice that names the nearest words to one that is none of them."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """click's sentence, and the nearest words."""
        near = translated(nearest(str(value), map(str, self.choices)))
        return f"{super().get_invalid_choice_message(value, ctx)} {near}".rstrip()


class LaterChoice(NearChoice):
    """A choice whose words are asked for when they are first needed: what makes them known is imported then."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = words
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._words)


def _read_configuration(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
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
            _("{file}: holds no [tool.doctor].", file=value),
            _("Give a doctor.toml, or a pyproject.toml with that table."),
        )
    _say_ignored(ctx.obj.ignored)
    runtime = "==".join(filter(None, map(ctx.obj.recipe_values.get, ("runtime", "runtime_version"))))
    ctx.default_map = {**ctx.obj.recipe_values, **given(runtime=runtime or None, fail_on=ctx.obj.fail_on)}


def _say_ignored(ignored: tuple[Message, ...]) -> None:
    """One line for all that was found and not believed."""
    if ignored:
        note = _("Not followed: {files}. `doctor trust FILE` or --config FILE allows it.", files=listed(ignored))
        click.echo(catalogue.translated(note), err=True)


def complete_rules(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Codes, names and family letters of rules that go on from the last word of a comma list."""
    from click.shell_completion import CompletionItem

    from doctor.lint.engine import load_rules

    before, comma, word = incomplete.rpartition(",")
    return [
        CompletionItem(before + comma + found, help=rule.title)
        for rule in load_rules()
        for found in (rule.code, rule.name)
        if (word and found.lower().startswith(word.lower())) or (not word and found == rule.code)
    ]


def complete_path(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Leaves it to the shell, which knows paths best."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_schemes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of schemes that begin so, in any case."""
    from doctor.formats.schemes import SCHEMES

    return [name for name in SCHEMES if name.startswith(incomplete.upper())]


checkpoint_argument = click.argument("path", metavar="CHECKPOINT", shell_complete=complete_path)
lang_option = option(
    "--lang",
    type=click.Choice(catalogue.LANGUAGES),
    default=None,
    expose_value=False,
    callback=take_language,
    show_default=False,
    help=_("Language of screens, Markdown and HTML.  [default: the locale's]"),
)
rules_dir_option = option(
    "--rules",
    "rules_dirs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help=_("Also load the rule files of DIR. They are Python: load only what you trust."),
)
plan_options = together(
    option(
        "--for",
        "--method",
        "method",
        type=NearChoice((*METHODS, *OTHER_GOALS)),
        default="gptq",
        help=_(
            "Quantization method of the recipe; serve judges files as they are, the default for quantized ones, and "
            "none the files alone."
        ),
    ),
    option(
        "--scheme",
        default="",
        metavar="NAME",
        shell_complete=complete_schemes,
        help=_(
            "Weights, activations and groups by one name, as FP8_DYNAMIC, INT8, W4A16, NVFP4A16 or MXFP4; a name that "
            "is not known lists them all."
        ),
    ),
    option("--bits", type=int, default=4, help=_("Bits per weight: 2, 3, 4 or 8; 5 to 7 in some formats.")),
    option("--group-size", type=int, default=128, help=_("in_features that share a scale; -1 for whole rows.")),
    option(
        "--sym/--asym",
        default=None,
        help=_(
            "Symmetric or asymmetric grid.  [default: asymmetric in the AWQ format and below 4 bits in GPTQ's, else "
            "symmetric]"
        ),
    ),
    option(
        "--tp", "--tensor-parallel-size", "tp", type=int, default=1, help=_("GPUs that share each linear at serving.")
    ),
    option(
        "--runtime",
        default="",
        metavar="NAME[==VERSION]",
        help=_("Where it will be served: {runtimes}.", runtimes=listed(RUNTIMES)),
    ),
    option(
        "--gpu",
        default="",
        metavar="NAME",
        help=_("Card that it will be served on, as rtx3090 or h100; a wrong name lists them."),
    ),
    option(
        "--config",
        is_eager=True,
        expose_value=False,
        callback=_read_configuration,
        metavar="FILE",
        help=_("This configuration; none for no file at all.  [default: the nearest of your project, or your own]"),
    ),
)
rule_options = together(
    option(
        "--select",
        multiple=True,
        metavar="RULES",
        shell_complete=complete_rules,
        help=_("Only these codes, families (G, W2), names or certainties; commas or repeated."),
    ),
    option(
        "--extend-select",
        multiple=True,
        metavar="RULES",
        shell_complete=complete_rules,
        help=_("These too, beside what is selected already."),
    ),
    option(
        "--ignore",
        multiple=True,
        metavar="RULES",
        shell_complete=complete_rules,
        help=_("All but these."),
        full_names=("--ignore-rules",),
    ),
    rules_dir_option,
    option(
        "--fail-on",
        type=click.Choice(("error", "warning", "info", "never")),
        default="error",
        help=_("Least severity for exit code 1."),
    ),
)


def format_option(known: tuple[str, ...], *flags: str) -> Callable:
    """-f and its long form, for the formats that a command can write."""
    return option(
        "-f",
        *(flags or ("--format",)),
        "formats",
        multiple=True,
        metavar="FORMAT[:FILE]",
        help=_("{formats}; repeatable, to stdout or to a FILE.  [default: full]", formats=listed(known)),
    )


verbose_option = option("-v", "--verbose", is_flag=True, help=_("Also list every rule, and why it was skipped."))
format_options = together(
    format_option(FORMATS),
    option("--concise", is_flag=True, help=_("Short for -f concise.")),
    verbose_option,
    lang_option,
)
device_option = option(
    "--device",
    default="auto",
    metavar="NAME",
    help=_("Where to compute: cpu, cuda, cuda:1, or auto: a GPU that torch sees, else the processor."),
)
progress_option = option(
    "--progress",
    type=click.Choice(stderr.MODES),
    default=None,
    is_eager=True,
    expose_value=False,
    callback=stderr.take_mode,
    show_default=False,
    help=_("How far it is, on stderr; json is an object a line.  [default: a bar where a person watches]"),
)
unsafe_option = option(
    "--unsafe-fixes",
    default="",
    metavar="[=CODES]",
    help=_("Also fixes that change numbers or shapes; =CODES only those, and those that go by name only."),
)
overwrite_option = option("--overwrite", is_flag=True, help=_("Replace an existing DIR."))


def memory_option(help: Message) -> Callable:
    """--memory SIZE: how much, and for what, differs from command to command."""
    return option("--memory", default="", metavar="SIZE", help=help)


def text_option(help: Message) -> Callable:
    """--text FILE, to compare or measure on."""
    return option("--text", type=PATH, metavar="FILE", help=help)


def words(values: Iterable[str]) -> tuple[str, ...]:
    """Words of a repeated option, which commas or blanks part."""
    return tuple(w for value in values for w in value.replace(",", " ").split())


def patterns(values: Iterable[str]) -> tuple[str, ...]:
    """Like words, but a comma or blank inside braces belongs to its pattern: {q,k}_proj is one."""
    return tuple(p for value in values for p in re.split(r"[,\s]+(?![^{}]*\})", value) if p)


def overrides(values: Iterable[str]) -> tuple[str, ...]:
    """`PATTERN:bits=B`, or `PATTERN=B` as it was written before, as the recipe has it: PATTERN=B."""
    found = []
    for value in values:
        if _SCHEME.fullmatch(value.strip()):
            continue
        match = re.fullmatch(r"(.+?)(?::bits)?=(\d+(?:\.\d+)?)", value.strip())
        if match is None or match[1] == ":bits":
            raise click.BadParameter(
                _("{value} must be PATTERN:bits=B or PATTERN:scheme=NAME, as '*down_proj:bits=8'.", value=repr(value)),
                param_hint="'--override'",
            )
        found.append(f"{match[1]}={match[2]}")
    return tuple(found)


def other_schemes(values: Iterable[str]) -> tuple[str, ...]:
    """Of the same values `PATTERN:scheme=NAME`, as the recipe has it: PATTERN=NAME. Raises DoctorError for a name that
    is not known.
    """
    found = (_SCHEME.fullmatch(value.strip()) for value in values)
    return tuple(f"{match[1]}={scheme_named(match[2]).name}" for match in found if match)


_SCHEME = re.compile(r"(.+):scheme=(.+)")


def size_in_bytes(text: str, option: str = "--memory") -> int | None:
    """`24GB`, `24GiB`, `24G` or a number of bytes, as given to an option; None for none."""
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)b?\s*", text, re.I)
    if not match:
        raise click.BadParameter(
            _("{text} is not a size; write 24GB or 24GiB.", text=repr(text)), param_hint=f"'{option}'"
        )
    if match[0].strip() == match[1] and float(match[1]) < LEAST_PLAIN:
        raise click.BadParameter(
            _("{text} is a number of bytes; must have a unit, as 24GB.", text=repr(text)), param_hint=f"'{option}'"
        )
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


def count_of_tokens(text: str | None) -> int | None:
    """`32768` or `32k`, where k is 1,024; None for none."""
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", text, re.I)
    if not match or not int(match[1]):
        raise click.BadParameter(
            _("{text} is not a number of tokens; write 32768 or 32k.", text=repr(text)), param_hint="'--context'"
        )
    return int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2].lower()]


def given(**options: Any) -> dict[str, Any]:
    """Options that were given; the others keep the default of the function that is called."""
    return {k: v for k, v in options.items() if v is not None}


def outputs_of(
    formats: Iterable[str], concise: bool = False, known: tuple[str, ...] = FORMATS
) -> list[tuple[str, str]]:
    """[(format, file or "")]; at most one of them to stdout."""
    chosen = [(_SHORT.get(name, name), file) for name, _colon, file in (f.partition(":") for f in formats)]
    if concise:
        chosen.append(("concise", ""))
    for name, _file in chosen:
        if name not in known:
            near = translated(nearest(name, known))
            said = translated(_("{word} is not one of {words}.", word=repr(name), words=", ".join(known)))
            raise click.BadParameter(f"{said} {near}".rstrip(), param_hint="'-f'")
    if sum(not file for _name, file in chosen) > 1:
        raise click.UsageError(
            _("Only one format can go to stdout; give the others a file, as in -f html:report.html.")
        )
    return chosen or [("full", "")]
