"""C114 two-chat-templates: chat_template.jinja and tokenizer_config.json hold different chat templates.

Why: transformers takes the file, older programs the one in tokenizer_config.json. A chat is then written in two ways,
and calibration need not see what serving sends.

Do: keep one of them; the file is the newer place.

False alarms: none known; equal templates are not counted, nor is white space at their ends.

Fix safety: unsafe: programs that do not know the file lose their template.

Sources: transformers src/transformers/tokenization_utils_base.py, `chat_template.jinja`.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, finding, rule
from doctor.lint.testing import tiny


@rule("C114", "warning")
def two_chat_templates(checkpoint, files, tokenizer_config):
    inner = (tokenizer_config or {}).get("chat_template")
    if "chat_template.jinja" not in files or not isinstance(inner, str):
        return
    outer = checkpoint.read_file("chat_template.jinja", 4 << 20).decode("utf-8", "replace")
    if inner.strip() != outer.strip():
        yield finding(
            f"two chat templates: {len(outer):,} characters in chat_template.jinja, {len(inner):,} others in tokenizer_config.json",
            at=Place("tokenizer_config.json", pointer="/chat_template"),
            fix=Fix(
                "remove the one in tokenizer_config.json",
                (RemoveJson("tokenizer_config.json", "/chat_template", inner),),
                "unsafe",
            ),
        )


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{% for m in messages %}{{ m.content }}{% endfor %}"
    case.json["tokenizer_config.json"]["chat_template"] = "{{ messages[0].content }}"
    return case, "two chat templates: 50 characters in chat_template.jinja, 25 others in tokenizer_config.json"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ messages[0].content }}"
    case.json["tokenizer_config.json"]["chat_template"] = "{{ messages[0].content }}\n"
    return case
