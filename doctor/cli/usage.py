"""click's errors of usage in another language than English: what is missing, unknown or no value of its option.

Each is changed into one that carries the whole sentence, while the language is set: click shows it when the command is
closed and the language with it. In English click's own words stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from doctor.core.near import nearest
from doctor.locale import catalogue
from doctor.locale.catalogue import say, translated


class Said(click.UsageError):
    """An error of usage in the reader's language."""

    def __init__(self, message: str, ctx: click.Context | None):
        super().__init__(message, ctx)
        self.lines: list[str] = []
        if ctx is not None:
            pieces = " ".join(ctx.command.collect_usage_pieces(ctx))
            self.lines = [
                say("Usage: {usage}", usage=f"{ctx.command_path} {pieces}"),
                say("`{command} --help` says more.", command=ctx.command_path),
                "",
            ]
        self.lines.append(say("Error: {message}", message=message))

    def show(self, file: object = None) -> None:
        """Print it on stderr."""
        click.echo("\n".join(self.lines), err=True)


@contextmanager
def in_words(ctx: click.Context) -> Iterator[None]:
    """Inside it an error of usage is given in the language that is set. It closes the context, which click leaves open
    where its words cannot be parsed: so the language ends with it.
    """
    try:
        yield
    except click.UsageError as error:
        said = in_language(error)
        ctx.close()
        if said is error:
            raise
        raise said from None


def in_language(error: click.ClickException) -> click.ClickException:
    """The same error in the language that is set; itself in English, and where it is no error of usage."""
    if catalogue.current() == "en" or isinstance(error, Said) or not isinstance(error, click.UsageError):
        return error
    return Said(_sentence(error), error.ctx)


def _sentence(error: click.UsageError) -> str:
    """What click says of it, in the language that is set; its own words for what is rare."""
    if (name := getattr(error, "option_name", None)) and isinstance(error, click.NoSuchOption):
        return f"{say('No such option: {name}.', name=name)} {_near(name, error)}".rstrip()
    if name := getattr(error, "command_name", None):
        return f"{say('No such command: {name}.', name=name)} {_near(name, error)}".rstrip()
    if isinstance(error, click.MissingParameter):
        option = error.param is not None and error.param.param_type_name == "option"
        return say("Missing option {name}." if option else "Missing argument {name}.", name=_name(error))
    if isinstance(error, click.BadParameter):
        return say("Invalid value for {name}: {why}", name=_name(error), why=_why(error))
    return translated(error.message)


def _why(error: click.BadParameter) -> str:
    kind = error.param.type if error.param is not None else None
    if isinstance(kind, click.Choice):
        return say("must be one of {words}.", words=", ".join(map(str, kind.choices)))
    if isinstance(kind, click.types.FloatParamType):
        return say("must be a number.")
    return say("must be a whole number.") if isinstance(kind, click.types.IntParamType) else translated(error.message)


def _near(name: str, error: click.UsageError) -> str:
    return translated(nearest(name, getattr(error, "possibilities", None) or ()))


def _name(error: click.BadParameter) -> str:
    hint = error.param_hint or (error.param.get_error_hint(error.ctx) if error.param is not None else "")
    return hint if isinstance(hint, str) else " / ".join(hint or ())
