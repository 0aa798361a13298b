"""The click classes of this command line: values from the environment, old names, help in the reader's language."""

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

import click

from doctor.cli import failures, groups, usage
from doctor.core.messages import _
from doctor.locale import catalogue

ENVIRONMENT = _(
    "Every option can also be set in the environment: --fail-on as DOCTOR_FAIL_ON. DOCTOR_DEBUG=1 shows tracebacks."
)
_BARE = {"--unsafe-fixes": "all"}  # options with an optional value, which is never taken from the next argument


class Option(click.Option):
    """An option whose help can be translated and that answers to names which no help page lists.

    aliases: old names, which print a note that names the new one. full_names: longer names for where one flag means
    different things on different commands.
    """

    def __init__(
        self,
        *args: Any,
        aliases: tuple[str, ...] = (),
        full_names: tuple[str, ...] = (),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.aliases, self.full_names = aliases, full_names
        if kwargs.get("help") is not None:
            self.help = kwargs["help"]  # click makes a plain str of it, without the template
        if self.default == "":
            self.show_default = False  # an empty text is no default to speak of

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        """DOCTOR_<NAME>, or that of an old name."""
        value = super().resolve_envvar_value(ctx)
        for alias in self.aliases:
            value = value or os.environ.get("DOCTOR_" + alias.lstrip("-").upper().replace("-", "_"))
        return value


class Command(click.Command):
    """A command whose options also come from DOCTOR_<OPTION>, where `--unsafe-fixes PATH` does not swallow the path."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("context_settings", {}).update(
            auto_envvar_prefix="DOCTOR", max_content_width=100, show_default=True
        )
        kwargs.setdefault("epilog", ENVIRONMENT)
        super().__init__(*args, **kwargs)
        self.help = kwargs.get("help")

    def get_help(self, ctx: click.Context) -> str:
        """The page that --help prints, in the language of the context."""
        return _page(self, ctx) or super().get_help(ctx)

    @property
    def examples(self) -> tuple[str, ...]:
        """Lines to paste; what stands after several blanks says what one does."""
        found = groups.EXAMPLES.get(self.callback.__module__.rpartition(".")[2] if self.callback else "", ())
        wide = max((len(line) for line, what in found if what), default=0)
        return tuple(f"{line:<{wide}}   {catalogue.translated(what)}".rstrip() for line, what in found)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under headings, where there are many."""
        for heading, options in groups.grouped(self.get_params(ctx)):
            with formatter.section(heading):
                formatter.write_dl([record for p in options if (record := p.get_help_record(ctx))])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, then what holds for every option."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the language, give old names their new ones and bare options their value, then parse."""
        listen_for_language(ctx, args)
        end = args.index("--") if "--" in args else len(args)
        with usage.in_words(ctx):
            return super().parse_args(ctx, [*(self._current(word) for word in args[:end]), *args[end:]])

    def _current(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        for param in self.params:
            if not isinstance(param, Option) or flag not in (*param.aliases, *param.full_names):
                continue
            if flag in param.aliases:
                note = _("{old} is now {new}; the next release drops the old name", old=flag, new=param.opts[0])
                click.echo(catalogue.translated(note), err=True)
            return param.opts[0] + equals + value
        return f"{word}={_BARE[word]}" if word in _BARE and any(word in p.opts for p in self.params) else word

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; an error is shown here, while the command's language is set."""
        with failures.shown():
            return super().invoke(ctx)


class Commands(Mapping[str, click.Command]):
    """name -> command. Each has a file of its own, imported when the command is asked for; its line in the list of
    commands is known without that.
    """

    def __init__(self, **lines: str):
        self.lines = lines

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.lines:
            raise KeyError(name)
        return import_module(f"doctor.cli.{name}").command

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __contains__(self, name: object) -> bool:
        return name in self.lines


class Group(click.Group):
    """The program itself: its page in the reader's language, and --lang before the command's name."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.help = kwargs.get("help")

    def get_help(self, ctx: click.Context) -> str:
        """The page that --help prints, in the language of the context."""
        return _page(self, ctx) or super().get_help(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        if not isinstance(self.commands, Commands):
            return super().format_commands(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl(list(self.commands.lines.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the language, then parse."""
        listen_for_language(ctx, args)
        with usage.in_words(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named; an error is in the reader's language."""
        with usage.in_words(ctx):
            return super().resolve_command(ctx, args)


def _page(command: click.Command, ctx: click.Context) -> str:
    """The help page in another language than English, "" where click's own will do."""
    if catalogue.current() == "en":
        return ""
    from doctor.cli import help

    return help.page(command, ctx)


def listen_for_language(ctx: click.Context, args: list[str]) -> None:
    """Set the language before click parses, because --help answers before --lang is read."""
    own = args[: args.index("--")] if "--" in args else args
    asked = [value for flag, value in pairwise(own) if flag == "--lang"]
    asked += [a.partition("=")[2] for a in own if a.startswith("--lang=")]
    set_language(ctx, asked[-1] if asked and asked[-1] in catalogue.LANGUAGES else None)


def set_language(ctx: click.Context, asked: str | None) -> None:
    """Until the command ends: the language asked for here, else before the command's name, else the environment's."""
    lang = asked or ctx.meta.get("lang") or os.environ.get("DOCTOR_LANG")
    ctx.with_resource(catalogue.language(lang if lang in catalogue.LANGUAGES else catalogue.from_environment()))


def take_language(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """The callback of --lang. Screens and pages are in this language; what machines read is English all the same."""
    if value:
        ctx.meta["lang"] = value
    set_language(ctx, value)
