"""C110 no-tokenizer: the directory holds no tokenizer.

Why: without it no text becomes token ids, so nothing can be calibrated or compared; with another model's tokenizer, the ids mean other
words.

Seen as:
- transformers: `Can't load tokenizer for`
- transformers: `Couldn't instantiate the backend tokenizer`

Do: copy tokenizer.json and tokenizer_config.json (or tokenizer.model) from the model's page or its base model.

False alarms: a directory that is meant to hold weights only; `--calibration` with ready token ids needs no tokenizer.

Fix safety: manual.

Sources: transformers src/transformers/models/auto/tokenization_auto.py.

标题: 目录里没有分词器

原因: 没有分词器，文本变不成词元 id，无法校准也无法比较；换成别的模型的分词器，同样的 id 又是另外的词。

处理: 从模型页面或基座模型处复制 tokenizer.json 和 tokenizer_config.json（或 tokenizer.model）。

误报: 目录本来就只放权重；用 `--calibration` 直接给词元 id 时也不需要分词器。

修复: 需手动。
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

KNOWN = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@rule("C110", "warning", implied_by=("F019", "F020", "F022"))
def no_tokenizer(checkpoint, files, config):
    if any(n in files or n in checkpoint.json for n in KNOWN) or any(n.endswith((".tiktoken", ".model")) for n in files):
        return
    yield finding("no tokenizer.json, tokenizer.model or other vocabulary is there", at=Place("tokenizer.json"),
                  fix=Fix("copy the tokenizer's files from the model's page or its base model", (), "manual"))


def bad():
    case = tiny()
    del case.json["tokenizer.json"]
    return case, "no tokenizer.json, tokenizer.model or other vocabulary is there"


def good():
    return tiny()
