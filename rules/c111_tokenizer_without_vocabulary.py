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
