"""C111 tokenizer-without-vocabulary: tokenizer.json is JSON, but holds no vocabulary.

Why: another file was saved under this name (a config, an error message), or the vocabulary was cut out. No text can be
read with it.

Seen as:
- tokenizers: `data did not match any variant of untagged enum ModelWrapper`
- tokenizers: `Exception: missing field`

Do: fetch tokenizer.json again.

False alarms: a form of vocabulary newer than this version.

Fix safety: unsafe, and only with `--from`: the base's file is taken; a fine-tune may have added tokens to it. Else
manual.

Sources: huggingface/tokenizers tokenizers/src/models/mod.rs.

标题: tokenizer.json 是合法 JSON，但里面没有词表

原因: 要么把别的文件（配置、报错信息）存成了这个名字，要么词表被删掉了。有它也读不了任何文本。

处理: 重新下载 tokenizer.json。

误报: 比当前版本更新的词表格式。

修复: 不安全，且需 `--from`：取基座模型的文件；微调可能加过词元。否则需手动。
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("C111", "error")
def tokenizer_without_vocabulary(checkpoint, json_files, base):
    file = json_files.get("tokenizer.json")
    if file is None or file.broken is not None:
        return
    value = file.value
    model = value.get("model") if isinstance(value, dict) else None
    if isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list)) and model["vocab"]:
        return
    what = "no model.vocab" if isinstance(value, dict) else f"a JSON {type(value).__name__} instead of an object"
    yield finding(
        f"tokenizer.json has {what}",
        at=Place("tokenizer.json", pointer=""),
        fix=from_base(base, "tokenizer.json", "fetch tokenizer.json again"),
    )


def bad():
    case = tiny()
    case.json["tokenizer.json"] = {"error": "Entry not found"}
    return case, "tokenizer.json has no model.vocab"


def good():
    return tiny()
