"""C113 token-ids-disagree: tokenizer_config.json and tokenizer.json give one token two ids.

Why: which id the text becomes depends on the class that loads it, so calibration and serving may not read the same text.

Do: make added_tokens_decoder agree with tokenizer.json, which fast tokenizers go by.

False alarms: none known.

Fix safety: manual; the table is rewritten as a whole by saving the tokenizer again.

Sources: transformers src/transformers/tokenization_utils_tokenizers.py.
"""

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny


@rule("C113", "warning")
def token_ids_disagree(checkpoint, tokenizer, tokenizer_config):
    listed = (tokenizer_config or {}).get("added_tokens_decoder")
    for number, token in listed.items() if isinstance(listed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        right = tokenizer.ids.get(text)
        if right is not None and str(right) != str(number):
            yield finding(f"{text} is {number} in tokenizer_config.json and {right} in tokenizer.json",
                          at=Place("tokenizer_config.json", pointer=f"/added_tokens_decoder/{number}", note=f"{right} in tokenizer.json"),
                          evidence={"token": text, "tokenizer.json": right}, fix=Fix("save the tokenizer again with save_pretrained", (), "manual"))


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["added_tokens_decoder"] = {"7": {"content": "</s>", "special": True}}
    return case, "</s> is 7 in tokenizer_config.json and 2 in tokenizer.json"


def good():
    return tiny()
