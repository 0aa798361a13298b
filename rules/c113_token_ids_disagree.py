"""C113 token-ids-disagree: tokenizer_config.json and tokenizer.json give one token two ids.

Why: which id the text becomes depends on the class that loads it, so calibration and serving may not read the same text.

Do: make added_tokens_decoder agree with tokenizer.json, which fast tokenizers go by.

False alarms: none known.

Fix safety: manual; the table is rewritten as a whole by saving the tokenizer again.

Sources: transformers src/transformers/tokenization_utils_tokenizers.py.

标题: tokenizer_config.json 与 tokenizer.json 给同一词元两个不同的 id

原因: 文本变成哪个 id 取决于用哪个类加载，于是校准和推理读到的可能不是同一段文本。

处理: 让 added_tokens_decoder 与 tokenizer.json 一致，快速分词器以后者为准。

误报: 暂无已知。

修复: 需手动；重新保存一次分词器，这张表就会整体重写。
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny


@rule("C113", "warning")
def token_ids_disagree(checkpoint, tokenizer, tokenizer_config):
    listed = (tokenizer_config or {}).get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        right = tokenizer.ids.get(text)
        if right is not None and str(right) != str(number):
            yield finding(f"{text} is {number} in tokenizer_config.json and {right} in tokenizer.json",
                          at=Place("tokenizer_config.json", pointer=f"/added_tokens_decoder/{number}", note=f"{right} in tokenizer.json"),
                          evidence={"token": text, "tokenizer.json": right}, fix=Fix("save the tokenizer again with save_pretrained", (), "manual"))


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["added_tokens_decoder"] = {"7": {"content": "</s>", "special": True}}
    return case, "</s> is 7 in tokenizer_config.json and 2 in tokenizer.json"


def good():
    return tiny()
