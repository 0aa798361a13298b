"""C119 tokenizer-unloadable: transformers does not load the tokenizer.

Why: without it there is no calibration text, no chat and no server. The file may be valid JSON and still not be what the
library reads: of a newer release, cut, or of a class that it does not have.

Seen as:
- tokenizers: `Exception: data did not match any variant of untagged enum`
- transformers: `Couldn't instantiate the backend tokenizer from one of`

Do: fetch the tokenizer's files again, or save the tokenizer with the release that will read it.

False alarms: a tokenizer whose own code is in the directory, which doctor never runs; a library that only it needs
(sentencepiece, tiktoken) is not installed here.

Fix safety: no fix: `doctor fix --from BASE --unsafe-fixes` takes the files of the base model where another rule names
what is wrong.

Sources: transformers src/transformers/tokenization_utils_base.py (from_pretrained); huggingface/tokenizers
bindings/python/src/tokenizer.rs.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import change, rehearsed

OWN_CODE = "trust_remote_code"


@rule(
    "C119",
    "error",
    certainty="certain",
    implied_by=("C110", "C111", "C116", "C146", "C148", "C150", "C161", "C167", "C173"),
)
def tokenizer_unloadable(checkpoint, rehearsal):
    if rehearsal.tokenizer and OWN_CODE not in rehearsal.tokenizer:
        yield finding(
            _("transformers does not load the tokenizer: {why}", why=rehearsal.tokenizer.removesuffix(".")),
            at=Place("tokenizer.json"),
            advice=_("fetch the tokenizer's files again, or save it with the release that will read it"),
        )


def bad():
    case = rehearsed()
    change(
        case, "checkpoint:", "given_rehearsal", tokenizer="data did not match any variant of untagged enum ModelWrapper"
    )
    return case, (
        "transformers does not load the tokenizer: data did not match any variant of untagged enum ModelWrapper"
    )


def good():
    return rehearsed()
