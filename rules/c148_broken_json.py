"""C148 broken-json: a JSON file of the checkpoint is not JSON.

Why: readers stop at it. An edit by hand (a comma too many, a comment), a cut download or an error page leaves this.

Seen as:
- transformers: `is not a valid JSON file`
- Python: `json.decoder.JSONDecodeError`
- tokenizers: `Exception: expected value at line 1 column 1`

Do: look at the place that is named; a comma before a closing bracket is the most frequent cause.

False alarms: none known: Python's own reader refuses the same text.

Fix safety: unsafe, and only with `--from`: the base's file is taken, which need not be the one that was lost. Else
manual.

Sources: transformers src/transformers/configuration_utils.py; RFC 8259.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny

# Other JSON files may be anything; no reader of models opens them.
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
                f"{name} is not JSON: {file.broken}",
                at=Place(name, line=file.broken.line, column=file.broken.column),
                fix=from_base(base, name, "correct the text at this place, or fetch the file again"),
            )
        elif not isinstance(file.value, dict) and not file.raw.startswith(b"version https://git-lfs"):
            yield finding(
                f"{name} holds a JSON {type(file.value).__name__}; it must be an object",
                at=Place(name, line=1),
                fix=from_base(base, name, "fetch the file again"),
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
