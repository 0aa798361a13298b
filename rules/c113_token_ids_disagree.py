"""C113 token-ids-disagree: tokenizer_config.json and tokenizer.json disagree on a token's id.

Why: which id the text becomes depends on the class that loads it, so calibration and serving may read the same text
differently.

Do: make added_tokens_decoder agree with tokenizer.json, which fast tokenizers use.

False alarms: none known.

Fix safety: safe where tokenizer.json is the only vocabulary: added_tokens_decoder gets its ids. Unsafe where a slow
tokenizer's file exists too, and manual where two tokens would get one id.

Sources: transformers src/transformers/tokenization_utils_tokenizers.py.
"""

from doctor.lint.rule import Edit, Fix, Place, RemoveJson, SetJson, _, finding, rule
from doctor.lint.testing import tiny

# Files that a slow tokenizer takes its ids from.
SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@rule("C113", "warning")
def token_ids_disagree(checkpoint, tokenizer, tokenizer_config, files):
    added = (tokenizer_config or {}).get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        right = tokenizer.ids.get(text)
        if right is not None and str(right) != str(number):
            yield finding(
                _(
                    "{token} is {id} in tokenizer_config.json and {right} in tokenizer.json",
                    token=text,
                    id=number,
                    right=right,
                ),
                at=Place(
                    "tokenizer_config.json",
                    pointer=f"/added_tokens_decoder/{number}",
                    note=_("{id} in tokenizer.json", id=right),
                ),
                evidence={"token": text, "tokenizer.json": right},
                fix=_renumber(added, tokenizer.ids, files),
            )


def _renumber(added, ids, files) -> Fix:
    """Move every entry to the id that tokenizer.json gives its text; the others stay."""
    wanted: dict[str, object] = {}
    for number, token in added.items():
        text = token.get("content") if isinstance(token, dict) else None
        place = str(ids.get(text, number))
        if wanted.setdefault(place, token) != token:
            return Fix(_("save the tokenizer again with save_pretrained"), (), "manual")
    at = "/added_tokens_decoder/"
    edits: list[Edit] = [RemoveJson("tokenizer_config.json", at + n, added[n]) for n in added if n not in wanted]
    edits += [
        SetJson("tokenizer_config.json", at + n, token, *([added[n]] if n in added else []))
        for n, token in wanted.items()
        if n not in added or added[n] != token
    ]
    return Fix(
        _("number added_tokens_decoder as tokenizer.json does"),
        tuple(edits),
        "unsafe" if any(n in files for n in SLOW) else "safe",
    )


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["added_tokens_decoder"] = {"7": {"content": "</s>", "special": True}}
    return case, "</s> is 7 in tokenizer_config.json and 2 in tokenizer.json"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.json["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(i): {"content": t} for i, t in ((1, "</s>"), (2, "<s>"), (50, "<x>"))
    }
    yield case
