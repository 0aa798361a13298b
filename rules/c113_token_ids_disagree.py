"""C113 token-ids-disagree: tokenizer_config.json and tokenizer.json give one token two ids.

Why: which id the text becomes depends on the class that loads it, so calibration and serving may not read the same
text.

Do: make added_tokens_decoder agree with tokenizer.json, which fast tokenizers go by.

False alarms: none known.

Fix safety: safe where tokenizer.json is the only vocabulary: added_tokens_decoder gets its numbers. Unsafe where a slow
tokenizer's file lies beside it, and manual where two tokens would get one number.

Sources: transformers src/transformers/tokenization_utils_tokenizers.py.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, SetJson, finding, rule
from doctor.lint.testing import tiny

# Files that a slow tokenizer takes its ids from.
SLOW = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


@rule("C113", "warning")
def token_ids_disagree(checkpoint, tokenizer, tokenizer_config, files):
    listed = (tokenizer_config or {}).get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        right = tokenizer.ids.get(text)
        if right is not None and str(right) != str(number):
            yield finding(
                f"{text} is {number} in tokenizer_config.json and {right} in tokenizer.json",
                at=Place(
                    "tokenizer_config.json",
                    pointer=f"/added_tokens_decoder/{number}",
                    note=f"{right} in tokenizer.json",
                ),
                evidence={"token": text, "tokenizer.json": right},
                fix=_renumber(listed, tokenizer.ids, files),
            )


def _renumber(listed, ids, files):
    """Every entry under the number that tokenizer.json gives its text; the others stay."""
    wanted = {}
    for number, token in listed.items():
        text = token.get("content") if isinstance(token, dict) else None
        place = str(ids.get(text, number))
        if wanted.setdefault(place, token) != token:
            return Fix("save the tokenizer again with save_pretrained", (), "manual")
    at = "/added_tokens_decoder/"
    edits = [RemoveJson("tokenizer_config.json", at + n, listed[n]) for n in listed if n not in wanted]
    edits += [
        SetJson("tokenizer_config.json", at + n, token, *([listed[n]] if n in listed else []))
        for n, token in wanted.items()
        if n not in listed or listed[n] != token
    ]
    return Fix(
        "number added_tokens_decoder as tokenizer.json does",
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
    """Cases whose cures the example above does not show."""
    case = tiny()
    case.json["tokenizer_config.json"]["added_tokens_decoder"] = {
        str(i): {"content": t} for i, t in ((1, "</s>"), (2, "<s>"), (50, "<x>"))
    }
    yield case
