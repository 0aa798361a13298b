"""C108 bos-doubled: BOS token is added twice by the tokenizer or the chat template.

Why: no training text began with two. The second BOS takes part of the attention sink from the first. Calibration on
such rows quantizes for a state that serving never sees, or the other way round.

Do: remove one of the two from the template or from tokenizer.json's post_processor.

False alarms: a template that writes BOS together with a tokenizer that adds it is fine (Llama 3, Gemma): programs
tokenize a rendered chat without special tokens.

Fix safety: unsafe: one of the two is removed, so that texts begin as in training; outputs change with it.

Sources: huggingface/open-r1 issue 462; EleutherAI/lm-evaluation-harness issue 2676.
"""

import re

from doctor.lint.rule import Fix, Place, ReplaceText, SetJson, _, finding, rule
from doctor.lint.testing import tiny


@rule("C108", "warning")
def bos_doubled(checkpoint, special, tokenizer, tokenizer_config, chat_template, json_files):
    name = special.names.get("bos")
    if not name:
        return
    times = _leading(checkpoint.value("tokenizer.json").get("post_processor"), name)
    if times > 1:
        yield finding(
            _("the post_processor of tokenizer.json adds {token} {times} times at the start", token=name, times=times),
            at=Place("tokenizer.json", pointer="/post_processor"),
            evidence={"times": times},
            fix=Fix(
                _("leave one of them in {place}", place="tokenizer.json"),
                tuple(_single(checkpoint.value("tokenizer.json")["post_processor"], name)),
                "unsafe",
            ),
        )
    if chat_template and (times := _template_times(chat_template, name)) > 1:
        file = "chat_template.jinja" if "chat_template.jinja" in checkpoint.entries else "tokenizer_config.json"
        yield finding(
            _("the chat template begins with {token} {times} times", token=name, times=times),
            at=Place(file),
            evidence={"times": times},
            fix=_template_fix(file, chat_template, tokenizer_config, name),
        )


def _leading(processor, name) -> int:
    """How many times a post-processor adds the token before a single text; processors of a sequence add up."""
    if not isinstance(processor, dict):
        return 0
    if processor.get("type") == "Sequence":
        return sum(_leading(p, name) for p in processor.get("processors") or ())
    if processor.get("type") != "TemplateProcessing":
        return 0
    count = 0
    for item in processor.get("single") or ():
        if not _is(item, name):
            break
        count += 1
    return count


def _single(processor, name, at="/post_processor"):
    """Edits that leave the token once before a text: the first processor of a sequence keeps it."""
    kept = False
    for place, part in _parts(processor, at):
        for key in ("single", "pair"):
            items = part.get(key) or []
            count = next((i for i, item in enumerate(items) if not _is(item, name)), len(items))
            if count > (0 if kept else 1):
                yield SetJson("tokenizer.json", f"{place}/{key}", items[count - (not kept) :], items)
        kept = kept or _leading(part, name) > 0


def _parts(processor, at):
    """(pointer, processor) of each that adds tokens by a template, in order."""
    if processor.get("type") == "Sequence":
        for i, part in enumerate(processor.get("processors") or ()):
            yield from _parts(part, f"{at}/processors/{i}")
    elif processor.get("type") == "TemplateProcessing":
        yield at, processor


def _is(item, name):
    token = item.get("SpecialToken") if isinstance(item, dict) else None
    return isinstance(token, dict) and token.get("id") == name


def _one(name: str) -> str:
    """Pattern of the token in a template, as text or as {{ bos_token }}."""
    return (
        r"(?:\{\{-?\s*bos_token\s*-?\}\}|" + re.escape(name) + r"|\{\{-?\s*['\"]" + re.escape(name) + r"['\"]\s*-?\}\})"
    )


def _template_times(template: str, name: str) -> int:
    """How many times in a row the template starts with the token."""
    return len(re.findall(_one(name), _front(template, name)))


def _front(template: str, name: str) -> str:
    """The start of the template: the token, any number of times, and white space."""
    match = re.match(rf"\s*(?:{_one(name)}\s*)*", template)
    return match[0] if match else ""


def _template_fix(file, template, tokenizer_config, name):
    """The front of the template with the token once: its first mention."""
    front = _front(template, name)
    match = re.match(rf"\s*{_one(name)}", front)
    first = match[0] if match else ""
    title = _("leave one of them in {place}", place=_("the chat template"))
    if file == "chat_template.jinja":
        return Fix(title, (ReplaceText(file, front, first),), "unsafe")
    if tokenizer_config.get("chat_template") != template:  # one of several named templates
        return Fix(_("take one of them out of the chat template"), (), "manual")
    return Fix(title, (SetJson(file, "/chat_template", first + template[len(front) :], template),), "unsafe")


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ bos_token }}<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    return case, "the chat template begins with <s> 2 times"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    once = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text], "special_tokens": {}}
    case.json["tokenizer.json"]["post_processor"] = {
        "type": "Sequence",
        "processors": [once, {**once, "single": [bos, bos, text]}],
    }
    yield case
    case = tiny()
    case.json["tokenizer_config.json"]["chat_template"] = "<s>{{ bos_token }}{{ messages[0].content }}"
    yield case
