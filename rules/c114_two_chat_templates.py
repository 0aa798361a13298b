"""C114 two-chat-templates: two different chat templates.

Why: transformers uses chat_template.jinja, older programs the template in tokenizer_config.json. A chat is then
rendered in two ways, and calibration may not see what serving sends.

Do: keep one of them; chat_template.jinja is the newer place.

False alarms: none known; equal templates are not counted, and white space at their ends is ignored.

Fix safety: unsafe: programs that do not know the file lose their template.

Sources: transformers src/transformers/tokenization_utils_base.py, `chat_template.jinja`.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, rule
from doctor.lint.testing import tiny


@rule("C114", "warning")
def two_chat_templates(checkpoint, files, tokenizer_config):
    inner = (tokenizer_config or {}).get("chat_template")
    if "chat_template.jinja" not in files or not isinstance(inner, str):
        return
    outer = checkpoint.read_file("chat_template.jinja", 4 << 20).decode("utf-8", "replace")
    if inner.strip() != outer.strip():
        yield finding(
            _(
                "two different chat templates: {outer:,} characters in chat_template.jinja, {inner:,} in tokenizer_config.json",
                outer=len(outer),
                inner=len(inner),
            ),
            at=Place("tokenizer_config.json", pointer="/chat_template"),
            fix=Fix(
                _("remove the one in tokenizer_config.json"),
                (RemoveJson("tokenizer_config.json", "/chat_template", inner),),
                "unsafe",
            ),
        )


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{% for m in messages %}{{ m.content }}{% endfor %}"
    case.json["tokenizer_config.json"]["chat_template"] = "{{ messages[0].content }}"
    return case, "two different chat templates: 50 characters in chat_template.jinja, 25 in tokenizer_config.json"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ messages[0].content }}"
    case.json["tokenizer_config.json"]["chat_template"] = "{{ messages[0].content }}\n"
    return case
