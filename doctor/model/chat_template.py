"""Chat templates as syntax trees, in the environment that transformers renders them in. No template is ever run."""

import re
from itertools import islice
from typing import Any

from doctor.core.facts import Unavailable
from doctor.core.messages import _

# transformers marks the assistant's text with its own tag; the parser can treat it like any other block tag.
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Functions that transformers adds to jinja's own.
_FUNCTIONS = ("raise_exception", "strftime_now")
MOST_TOKENS = 20_000  # a second of parsing; the templates of known models have up to a few thousand


def parse_template(text: str) -> tuple[Any, Any]:
    """(environment, tree) of a template. Raises jinja2.TemplateSyntaxError for a broken one, Unavailable for one of
    more than MOST_TOKENS, and without jinja2.
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
    if next(islice(environment.lexer.tokeniter(text, None), MOST_TOKENS, None), None) is not None:
        raise Unavailable(_("the chat template has more than {most:,} tokens", most=MOST_TOKENS))
    try:
        return environment, environment.parse(text)
    except RecursionError:
        from jinja2 import TemplateSyntaxError

        raise TemplateSyntaxError(_("nested too deeply"), 1) from None


def free_names(tree: Any) -> set[str]:
    """Names that a template uses and does not set. jinja finds them by generating code, and works out what is constant
    on the way: `9 ** 9 ** 9` never ends there. So constants are taken out of the tree first, which is changed.
    """
    from jinja2 import meta, nodes
    from jinja2.visitor import NodeTransformer

    class Opaque(NodeTransformer):
        def visit_Const(self, node: Any) -> Any:
            return nodes.Name("constant", "load", lineno=node.lineno)

    environment = tree.environment
    environment.filters |= {node.name: len for node in tree.find_all(nodes.Filter)}  # code is generated for known ones
    environment.tests |= {node.name: len for node in tree.find_all(nodes.Test)}
    return meta.find_undeclared_variables(Opaque().visit(tree)) - {"constant"}


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
