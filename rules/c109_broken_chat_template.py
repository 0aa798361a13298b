"""C109 broken-chat-template: chat template has a syntax error.

Why: every chat request fails, and so does calibration on chats. Nobody notices before the first one. Of a template with a
name of its own (for tools, for retrieval) only the requests fail that use it.

Seen as:
- jinja2: `jinja2.exceptions.TemplateSyntaxError`
- vLLM: `ValueError: Failed to load chat template`

Do: repair the template at the given line, or use the base model's template.

False alarms: a program's own template tags. Loop controls and transformers' `generation` tag are known here.

Fix safety: unsafe, and only with `--from`: the donor's template is used. Else manual. doctor parses the template and
never runs it.

Sources: transformers src/transformers/utils/chat_template_utils.py; Jinja documentation, "Sandbox".
"""

from doctor.lint.rule import Fix, Place, Unavailable, _, chat_template_fix, finding, parse_template, rule
from doctor.lint.testing import tiny


@rule("C109", "error")
def broken_chat_template(checkpoint, chat_template, other_chat_templates, base):
    if chat_template is None and not other_chat_templates:
        return
    try:
        from jinja2 import TemplateSyntaxError
    except ImportError:
        raise Unavailable(_("jinja2 is not installed")) from None
    for name, (text, file) in other_chat_templates.items():
        try:
            parse_template(text)
        except TemplateSyntaxError as error:
            yield finding(
                _(
                    "the chat template {name!r} has a syntax error at line {line}: {error}",
                    name=name[:40],
                    line=error.lineno,
                    error=(error.message or "").rstrip("."),
                ),
                at=Place(file, line=error.lineno) if file.endswith(".jinja") else Place(file, pointer="/chat_template"),
                evidence={"line": error.lineno},
                fix=Fix(_("repair the template at this line"), (), "manual"),
            )
    if chat_template is None:
        return
    try:
        parse_template(chat_template)
    except TemplateSyntaxError as error:
        own = "chat_template.jinja" in checkpoint.entries
        at = (
            Place("chat_template.jinja", line=error.lineno)
            if own
            else Place("tokenizer_config.json", pointer="/chat_template")
        )
        yield finding(
            _(
                "the chat template has a syntax error at line {line}: {error}",
                line=error.lineno,
                error=(error.message or "").rstrip("."),
            ),
            at=at,
            evidence={"line": error.lineno},
            fix=chat_template_fix(checkpoint, base, own),
        )


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    return case, "the chat template has a syntax error at line 2: unexpected '}'"


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.json["tokenizer_config.json"]["chat_template"] = [
        {"name": "default", "template": "{{ messages[0]['content'] }}"},
        {"name": "tool_use", "template": "{% for t in tools %}"},
    ]
    yield case


def good():
    case = tiny()
    case.files["chat_template.jinja"] = (
        b"{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    return case
