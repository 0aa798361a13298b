"""The recipe of a command: flags, then the configuration, then what a quantized checkpoint says of itself."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from doctor.cli.options import OTHER_GOALS
from doctor.core.messages import _
from doctor.core.recipe import Recipe, parse_runtime
from doctor.locale import catalogue

if TYPE_CHECKING:
    from doctor.checkpoint.directory import Checkpoint
    from doctor.lint.config import Config

PLAN = (
    "method",
    "bits",
    "group_size",
    "sym",
    "tp",
    "gpu",
)  # the parameters of options.plan_options, beside the runtime


def asked_recipe(flags: dict[str, Any], config: "Config | None" = None, **more: Any) -> Recipe:
    """The recipe of the flags, which are taken out of `flags`.

    Fields that the command has no flag for come from the configuration.
    """
    name, version = parse_runtime(flags.pop("runtime"))
    scheme = flags.pop("scheme")
    values = dict(config.recipe_values) if config else {}
    asked = {field: flags.pop(field) for field in PLAN}
    if scheme:
        more |= _of_scheme(scheme, {**asked, **{key: value for key, value in more.items() if key == "format"}})
    elif asked["method"] in OTHER_GOALS:
        asked |= {"goal": asked["method"], "method": values.get("method", Recipe.method)}
    values |= asked
    return Recipe(**{**values, "runtime": name, "runtime_version": version, **more})


def _of_scheme(name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields of a named scheme, but for those that were typed."""
    from click.core import ParameterSource

    from doctor.formats.schemes import fields_of

    ctx, typed = click.get_current_context(), (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    return fields_of(name, {key: value for key, value in asked.items() if ctx.get_parameter_source(key) in typed})


def stored_or_asked(ctx: click.Context, checkpoint: "Checkpoint", asked: Recipe) -> Recipe:
    """The recipe that a quantized checkpoint states, unless flags, environment or configuration ask for another.

    A contradiction is said on stderr. A method that was typed asks to quantize, whatever the files hold.
    """
    from click.core import ParameterSource

    from doctor.model.quantization_config import STATED, stored_recipe

    typed = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    if not asked.goal and any(ctx.get_parameter_source(name) in typed for name in ("method", "scheme")):
        return replace(asked, goal="quantize")
    stored = stored_recipe(checkpoint, asked)
    if asked.goal in OTHER_GOALS:
        return stored
    if all(ctx.get_parameter_source(name) is ParameterSource.DEFAULT for name in STATED):
        return stored
    if any(getattr(stored, name) != getattr(asked, name) for name in STATED):
        note = _(
            "{name} states {stored} of itself and is judged so; {asked} was asked for",
            name=checkpoint.name,
            stored=_grid(stored),
            asked=_grid(asked),
        )
        click.echo(catalogue.translated(note), err=True)
    return asked


def _grid(recipe: Recipe) -> str:
    return f"{recipe.label()} {'sym' if recipe.sym else 'asym'}"
