"""O646 gguf-chat-template: the chat template in a GGUF file does not parse.

Why: llama.cpp renders every chat request with the template of the file. One that does not parse stops the server when it
starts, or makes it take another template, which ends turns otherwise than in training.

Seen as:
- llama.cpp: `Failed to parse chat template`

Do: take the template of the original, or start the server with --chat-template-file.

False alarms: a template that llama.cpp's own parser takes and jinja2 does not.

Fix safety: manual; the template stands in the original.

Sources: ggml-org/llama.cpp common/chat.cpp.
"""

from doctor.lint.rule import Place, Unavailable, _, finding, parse_template, rule
from doctor.lint.testing import tiny_gguf, w


@rule("O646", "warning", certainty="likely")
def gguf_chat_template(checkpoint, gguf_models):
    for model in gguf_models:
        template = model.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str):
            continue
        try:
            from jinja2 import TemplateSyntaxError
        except ImportError:
            raise Unavailable(_("jinja2 is not installed")) from None
        try:
            parse_template(template)
        except TemplateSyntaxError as error:
            yield finding(
                _(
                    "{model}: tokenizer.chat_template, line {line}: {why}",
                    model=model.name,
                    line=error.lineno,
                    why=error.message,
                ),
                at=Place(model.files[0].name),
                evidence={"line": error.lineno},
                advice=_("take the template of the original"),
            )


def bad():
    case = tiny_gguf()
    case.keys["tokenizer.chat_template"] = w.text("{% for m in messages %}{{ m }}")
    return case, (
        "model.gguf: tokenizer.chat_template, line 1: Unexpected end of template. Jinja was looking for the following tags: "
        "'endfor' or 'else'. The innermost block that needs to be closed is 'for'."
    )


def good():
    case = tiny_gguf()
    case.keys["tokenizer.chat_template"] = w.text("{% for m in messages %}{{ m }}{% endfor %}")
    return case
