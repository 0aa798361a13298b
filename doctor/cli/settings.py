"""`doctor check --show-settings`: each setting, its value, and who had the last word."""

import sys

import click
from click.core import ParameterSource

from doctor.core.recipe import Recipe

KEYS = {  # parameter -> its key in the configuration
    "fail_on": "fail-on",
    "rules_dirs": "rules",
    "select": "select",
    "extend_select": "extend-select",
    "ignore": "ignore",
    "stage": "stage",
}
BUILT_IN = "built in"


def print_settings(ctx: click.Context) -> None:
    """Print the table of the settings that this command line would check with."""
    from doctor.report.pages import show_settings
    from doctor.report.screen import console

    rows = []
    for param in ctx.command.params:
        name = param.name or ""
        key = KEYS.get(name) or (f"recipe.{name}" if name in Recipe.__dataclass_fields__ else None)
        if key is None:
            continue
        origin = _origin(ctx, param, key)
        filed = {
            "rules": ctx.obj.rules_dirs,
            "select": ctx.obj.selection.select,
            "extend-select": ctx.obj.selection.extend_select,
            "ignore": ctx.obj.selection.ignore,
        }.get(key, ())
        if filed:
            rows.append((key, filed, ctx.obj.origin(key)))
        if not filed or origin != BUILT_IN:
            rows.append((key, ctx.params[name], origin))
    shown = {key for key, _value, _origin in rows}
    rows += [
        (f"recipe.{k}", v, ctx.obj.origin(f"recipe.{k}"))
        for k, v in ctx.obj.recipe_values.items()
        if f"recipe.{k}" not in shown and k != "runtime_version"
    ]
    rows += [(f"suppress {s.code}", s.where or "every place", s.origin) for s in ctx.obj.suppress]
    show_settings(rows, ctx.obj.file, console(sys.stdout))


def _origin(ctx: click.Context, param: click.Parameter, key: str) -> str:
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.COMMANDLINE:
        return param.opts[0]
    if source is ParameterSource.ENVIRONMENT:
        return f"DOCTOR_{(param.name or '').upper()}"
    return ctx.obj.origin(key) if source is ParameterSource.DEFAULT_MAP else BUILT_IN
