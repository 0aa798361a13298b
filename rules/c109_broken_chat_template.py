"""C109 broken-chat-template: chat template has a syntax error.

Why: every chat request fails, and so does calibration on chats. Nobody notices before the first one.

Seen as:
- jinja2: `jinja2.exceptions.TemplateSyntaxError`
- vLLM: `ValueError: Failed to load chat template`

Do: repair the template at the given line, or use the base model's template.

False alarms: a program's own template tags. Loop controls and transformers' `generation` tag are known here.

Fix safety: unsafe, and only with `--from`: the donor's template is used. Else manual. doctor parses the template and
never runs it.

Sources: transformers src/transformers/utils/chat_template_utils.py; Jinja documentation, "Sandbox".
"""

import re

from doctor.lint.rule import Fix, Place, SetJson, Unavailable, _, finding, from_base, rule
from doctor.lint.testing import tiny

# transformers marks the assistant's text with its own tag; the parser can treat it like any other block tag.
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


@rule("C109", "error")
def broken_chat_template(checkpoint, chat_template, base):
    if chat_template is None:
        return
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Unavailable(_("jinja2 is not installed")) from None
    text = GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", chat_template)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        environment.parse(text)
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
            fix=_from_base(checkpoint, base, own),
        )


def _from_base(checkpoint, base, own):
    """The donor's template, from the same file and key."""
    manual = _("repair the template, or take the base model's")
    theirs = (base.checkpoint.value("tokenizer_config.json") or {}).get("chat_template") if base is not None else None
    if own or not isinstance(theirs, str):
        return from_base(base if own else None, "chat_template.jinja", manual)
    mine = checkpoint.value("tokenizer_config.json")["chat_template"]
    return Fix(
        _("take the chat template of {base}", base=base.text),
        (SetJson("tokenizer_config.json", "/chat_template", theirs, mine),),
        "unsafe",
    )


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{% for m in messages %}\n{{ m.content }\n{% endfor %}"
    return case, "the chat template has a syntax error at line 2: unexpected '}'"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = (
        b"{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    return case
