"""Chat templates as syntax trees, in the environment that transformers renders them in. No template is ever run."""

import re
from typing import Any

from doctor.core.facts import Unavailable
from doctor.core.messages import _

# transformers marks the assistant's text with its own tag; the parser can treat it like any other block tag.
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Functions that transformers adds to jinja's own.
_FUNCTIONS = ("raise_exception", "strftime_now")


def parse_template(text: str) -> tuple[Any, Any]:
    """(environment, tree) of a template. Raises jinja2.TemplateSyntaxError for a broken one, Unavailable without
    jinja2.
    """
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Unavailable(_("jinja2 is not installed")) from None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= dict.fromkeys(_FUNCTIONS)
    text = _GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", text)
    return environment, environment.parse(text)


def parsed_template(text: str) -> tuple[Any, Any] | None:
    """(environment, tree) of a template, None for a broken one."""
    from importlib.util import find_spec

    if find_spec("jinja2") is None:
        raise Unavailable(_("jinja2 is not installed"))
    from jinja2 import TemplateSyntaxError

    try:
        return parse_template(text)
    except TemplateSyntaxError:
        return None
