"""C111 tokenizer-without-vocabulary: tokenizer.json has no vocabulary.

Why: another file was saved under this name (a config, an error message), or the vocabulary was removed. No text can be
tokenized with it.

Seen as:
- tokenizers: `data did not match any variant of untagged enum ModelWrapper`
- tokenizers: `Exception: missing field`

Do: fetch tokenizer.json again.

False alarms: a vocabulary format newer than this version.

Fix safety: unsafe, and only with `--from`: the donor's file is used; a fine-tune may have added tokens to it. Else
manual.

Sources: huggingface/tokenizers tokenizers/src/models/mod.rs.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
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
    yield finding(
        _("tokenizer.json has no model.vocab")
        if isinstance(value, dict)
        else _("{file} is a JSON {kind}; it must be an object", file="tokenizer.json", kind=type(value).__name__),
        at=Place("tokenizer.json", pointer=""),
        fix=from_base(base, "tokenizer.json", _("fetch tokenizer.json again")),
    )


def bad():
    case = tiny()
    case.json["tokenizer.json"] = {"error": "Entry not found"}
    return case, "tokenizer.json has no model.vocab"


def good():
    return tiny()
