"""C117 refused-chat-template: chat template uses what the renderer does not have.

Why: transformers and vLLM render templates in jinja's immutable sandbox. An unknown filter, test or function stops
every chat request, and so do names that begin with an underscore, methods that change a list, and include: the sandbox
refuses them, because a template must not reach the program that renders it.

Seen as:
- jinja2: `jinja2.exceptions.TemplateAssertionError: No filter named`
- jinja2: `jinja2.exceptions.SecurityError: access to attribute`
- jinja2: `is undefined`
- vLLM: `ValueError: Failed to load chat template`

Do: use the base model's template, or replace the call: `x + [y]` for `x.append(y)`.

False alarms: a branch that is never taken; a function that a program passes to the template itself.

Fix safety: unsafe, and only with `--from`: the donor's template is used. Else manual. doctor parses the template and
never runs it.

Sources: transformers src/transformers/utils/chat_template_utils.py; jinja2 src/jinja2/sandbox.py.
"""

from doctor.lint.rule import Place, _, chat_template_fix, finding, free_names, parsed_template, rule
from doctor.lint.testing import tiny

CHANGES = frozenset(
    [
        "append",
        "clear",
        "extend",
        "insert",
        "pop",
        "popitem",
        "remove",
        "reverse",
        "setdefault",
        "sort",
        "update",
        "add",
        "discard",
    ]
)


@rule("C117", "warning", certainty="likely", implied_by=("C109",))
def refused_chat_template(checkpoint, chat_template, base):
    tree = parsed_template(chat_template) if chat_template is not None else None
    if tree is None:
        return
    own = "chat_template.jinja" in checkpoint.entries
    seen = set()
    for line, what in sorted(_refused(*tree), key=lambda found: found[0]):
        if str(what) not in seen:
            seen.add(str(what))
            yield finding(
                _("chat template, line {line}: {what}", line=line, what=what),
                at=Place("chat_template.jinja", line=line)
                if own
                else Place("tokenizer_config.json", pointer="/chat_template"),
                evidence={"line": line},
                fix=chat_template_fix(checkpoint, base, own),
            )


def _refused(environment, tree):
    """(line, what) of everything that transformers' renderer does not have or refuses."""
    from jinja2 import nodes

    guarded = set()
    for node in tree.find_all(nodes.Filter):
        if node.name not in environment.filters:
            yield node.lineno, _("no filter {name!r}", name=node.name)
    for node in tree.find_all(nodes.Test):
        if node.name not in environment.tests:
            yield node.lineno, _("no test {name!r}", name=node.name)
        elif node.name == "defined" and isinstance(node.node, nodes.Name):
            guarded.add(node.node.name)
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        yield node.lineno, _("other templates cannot be loaded")
    for node in tree.find_all(nodes.Getattr):
        if node.attr.startswith("_"):
            yield node.lineno, _("the sandbox refuses the attribute {name!r}", name=node.attr)
    calls = list(tree.find_all(nodes.Call))
    free = free_names(tree) - environment.globals.keys() - guarded
    for node in calls:
        called = node.node
        if isinstance(called, nodes.Getattr) and called.attr in CHANGES:
            yield node.lineno, _("the sandbox refuses {name}(), which changes its object", name=called.attr)
        elif isinstance(called, nodes.Name) and called.name in free:
            yield node.lineno, _("no function {name!r}", name=called.name)


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{% for m in messages %}\n{{ m.content | shout }}\n{% endfor %}"
    return case, "chat template, line 2: no filter 'shout'"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = (
        b"{% macro turn(m) %}{{ m.content | trim | tojson }}{% endmacro %}"
        b"{% if not messages %}{{ raise_exception('empty') }}{% endif %}{{ strftime_now('%d %b %Y') }}"
        b"{% for m in messages %}{% generation %}{{ turn(m) }}{% endgeneration %}{% endfor %}"
    )
    return case
