"""The token that ends a turn is read from templates of every common form, and none is guessed."""

import pytest

from doctor.model.turn_end import turn_end

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = {"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start|>", "<end_of_turn>", "<start_of_turn>"}

FORMS = {
    "joined in an expression": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "set first, printed later": (
        "{% for m in messages %}{% set content = '<|start|>' + m['role'] + '\n' + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}",
        "<|eot_id|>",
    ),
    "as text between tags": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}",
        "<end_of_turn>",
    ),
    "by the variable eos_token": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "a branch a role, with tools": (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
        "{% for call in m.tool_calls %}<tool_call>{{ call | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
        "{% endfor %}",
        "<|im_end|>",
    ),
    "two tokens: not guessed": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% else %}{{ m.content }}<|eot_id|>"
        "{% endif %}{% endfor %}",
        None,
    ),
    "no content": ("{{ bos_token }}<|im_end|>", None),
    "broken": ("{% for m in messages %}{{ m.content }}<|im_end|>", None),
    "content only in a condition": ("{% if messages[0].content %}<|im_end|>{% endif %}", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_token_after_every_content_is_found(form):
    template, token = FORMS[form]
    assert turn_end(template, SPECIAL, NAMED) == token


def test_a_template_that_would_never_end_is_not_run():
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{{ m.content }}<|im_end|>{% endfor %}{% endfor %}"
    assert turn_end(forever, SPECIAL, NAMED) == "<|im_end|>"
