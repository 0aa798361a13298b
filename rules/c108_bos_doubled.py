"""C108 bos-doubled: the tokenizer or the chat template puts the BOS token at the front twice.

Why: no training text began with two. The second BOS takes the part of the attention sink from the first, and calibration on such rows
quantizes for a state that serving never sees, or the other way round.

Do: take one of the two out of the template or of tokenizer.json's post_processor.

False alarms: a template that writes BOS and a tokenizer that adds it are healthy together (Llama 3, Gemma): programs tokenize a
rendered chat without special tokens.

Fix safety: manual; which of the two is meant to stay is the author's to say.

Sources: huggingface/open-r1 issue 462; EleutherAI/lm-evaluation-harness issue 2676.

标题: 分词器或对话模板在开头放了两个 BOS 词元

原因: 训练文本从不以两个 BOS 开头。第二个会分走第一个的 attention sink（注意力汇聚）作用；用这样的行校准，量化
所针对的状态在推理时不会出现，反之亦然。

处理: 从模板或 tokenizer.json 的 post_processor 里去掉其中一个。

误报: 模板写 BOS、分词器也加 BOS，这样的组合本身没问题（Llama 3、Gemma）：程序对渲染好的对话分词时不再加特殊词
元。

修复: 需手动；该留哪一个由作者决定。
"""

import re

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny


@rule("C108", "warning")
def bos_doubled(checkpoint, special, tokenizer, chat_template, json_files):
    name = special.names.get("bos")
    if not name:
        return
    times = _leading(checkpoint.value("tokenizer.json").get("post_processor"), name)
    if times > 1:
        yield finding(f"the post_processor of tokenizer.json puts {name} at the front {times} times",
                      at=Place("tokenizer.json", pointer="/post_processor"), evidence={"times": times},
                      fix=Fix("take one of them out of tokenizer.json", (), "manual"))
    if chat_template and (times := _template_times(chat_template, name)) > 1:
        file = "chat_template.jinja" if "chat_template.jinja" in checkpoint.entries else "tokenizer_config.json"
        yield finding(f"the chat template begins with {name} {times} times", at=Place(file), evidence={"times": times},
                      fix=Fix("take one of them out of the chat template", (), "manual"))


def _leading(processor, name) -> int:
    """How often a post-processor puts the token before a single text; processors of a sequence add up."""
    if not isinstance(processor, dict):
        return 0
    if processor.get("type") == "Sequence":
        return sum(_leading(p, name) for p in processor.get("processors") or ())
    if processor.get("type") != "TemplateProcessing":
        return 0
    count = 0
    for item in processor.get("single") or ():
        token = item.get("SpecialToken") if isinstance(item, dict) else None
        if not isinstance(token, dict) or token.get("id") != name:
            break
        count += 1
    return count


def _template_times(template: str, name: str) -> int:
    """How many times in a row the template starts with the token, as text or as {{ bos_token }}."""
    one = r"(?:\{\{-?\s*bos_token\s*-?\}\}|" + re.escape(name) + r"|\{\{-?\s*['\"]" + re.escape(name) + r"['\"]\s*-?\}\})"
    match = re.match(rf"\s*((?:{one}\s*)*)", template)
    return len(re.findall(one, match[1]))


def bad():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ bos_token }}<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    return case, "the chat template begins with <s> 2 times"


def good():
    case = tiny()
    case.files["chat_template.jinja"] = b"{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    return case
