"""C110 no-tokenizer: no tokenizer.

Why: without it no text becomes token ids, so nothing can be calibrated or compared. With another model's tokenizer, the
ids mean other words.

Seen as:
- transformers: `Can't load tokenizer for`
- transformers: `Couldn't instantiate the backend tokenizer`

Do: copy tokenizer.json and tokenizer_config.json (or tokenizer.model) from the model's page or its base model.

False alarms: a directory that holds only weights on purpose; `--calibration` with ready token ids needs no tokenizer.

Fix safety: unsafe, and only with `--from`: the donor's files are used; a fine-tune may have added tokens to them. Else
manual.

Sources: transformers src/transformers/models/auto/tokenization_auto.py.
"""

from doctor.lint.rule import Fix, Place, _, finding, listed, rule
from doctor.lint.testing import tiny

KNOWN = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


@rule("C110", "warning", implied_by=("F019", "F020", "F022", "G330"))
def no_tokenizer(checkpoint, files, config, base):
    if any(n in files or n in checkpoint.json for n in KNOWN) or any(
        n.endswith((".tiktoken", ".model")) for n in files
    ):
        return
    yield finding(
        _("no tokenizer.json, tokenizer.model or other vocabulary exists"),
        at=Place("tokenizer.json"),
        fix=_from_base(base, files),
    )


def _from_base(base, files):
    """The donor's tokenizer files that are missing here."""
    offers = [base.offer_file(n) for n in (*KNOWN, *BESIDE) if n not in files] if base is not None else []
    edits = tuple(offer[0] for offer in offers if offer is not None)
    if not any(e.file in KNOWN for e in edits):
        return Fix(_("copy the tokenizer's files from the model's page or its base model"), (), "manual")
    return Fix(_("take {name} from {base}", name=listed(e.file for e in edits), base=base.text), edits, "unsafe")


def bad():
    case = tiny()
    del case.json["tokenizer.json"]
    return case, "no tokenizer.json, tokenizer.model or other vocabulary exists"


def good():
    return tiny()
