"""C148 broken-json: JSON file has a syntax error or is not an object.

Why: readers stop at it. An edit by hand (an extra comma, a comment), a truncated download or an error page causes this.

Seen as:
- transformers: `is not a valid JSON file`
- Python: `json.decoder.JSONDecodeError`
- tokenizers: `Exception: expected value at line 1 column 1`

Do: look at the given position; a comma before a closing bracket is the most frequent cause.

False alarms: none known: Python's own reader refuses the same text.

Fix safety: unsafe, and only with `--from`: the donor's file is used, which may differ from the one that was lost. Else
manual.

Sources: transformers src/transformers/configuration_utils.py; RFC 8259.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny

# Other JSON files may hold anything; no model reader opens them.
READ = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "vocab.json",
    "added_tokens.json",
    "quantize_config.json",
    "preprocessor_config.json",
)


@rule("C148", "error", implied_by=("F002",))
def broken_json(checkpoint, json_files, base):
    for name in READ:
        file = json_files.get(name)
        if file is None:
            continue
        if file.broken is not None:
            yield finding(
                _("{file} is not JSON: {detail}", file=name, detail=file.broken.args[0]),
                at=Place(name, line=file.broken.line, column=file.broken.column),
                fix=from_base(base, name, _("correct the text at this place, or fetch the file again")),
            )
        elif not isinstance(file.value, dict) and not file.raw.startswith(b"version https://git-lfs"):
            yield finding(
                _("{file} is a JSON {kind}; it must be an object", file=name, kind=type(file.value).__name__),
                at=Place(name, line=1),
                fix=from_base(base, name, _("fetch the file again")),
            )


def bad():
    case = tiny()
    case.files["generation_config.json"] = b'{\n  "bos_token_id": 1,\n}\n'
    reason = "generation_config.json is not JSON: "
    import json

    try:
        json.loads(case.files["generation_config.json"])
    except json.JSONDecodeError as error:
        reason += f"{error.msg} at line {error.lineno} column {error.colno}"
    return case, reason


def good():
    return tiny()
