"""C104 bos-disagrees: config.json and the tokenizer have different BOS tokens.

Why: which one a text begins with depends on the program: some ask the tokenizer, some read config.json. Calibrating
with one and serving with the other shifts every activation that follows.

Do: take the tokenizer's token, with which training texts were made.

False alarms: DeepSeek's distilled Qwen models ship such a pair; where generation_config.json sides with the tokenizer
it is said as information only.

Fix safety: unsafe; that the tokenizer is right is likely, not certain.

Sources: turboderp/exllamav2 exllamav2/tokenizer/tokenizer.py (config first); transformers
src/transformers/tokenization_utils_base.py.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny


@rule("C104", "warning", implied_by=("C102", "C103", "C106"))
def bos_disagrees(checkpoint, special, tokenizer):
    stated = special.of("config.json", "bos")
    name = special.names.get("bos")
    right = tokenizer.ids.get(name)
    if not stated.ids or right is None or right in stated.ids:
        return
    backed = right in special.of("generation_config.json", "bos").ids
    token = tokenizer.token(stated.ids[0])
    shown = f" ({token})" if token is not None else ""
    yield finding(
        f"bos_token_id is {stated.ids[0]}{shown} in config.json; the tokenizer's is {name} = {right}",
        at=Place("config.json", pointer=stated.pointer, note=f"tokenizer_config.json: {name} = {right}"),
        evidence={"config": stated.ids[0], "tokenizer": right},
        severity="info" if backed else "",
        fix=Fix(
            f'set "bos_token_id": {right} ({name})',
            (SetJson("config.json", stated.pointer, right, stated.value),),
            "unsafe",
        ),
    )


def bad():
    case = tiny()
    case.config["bos_token_id"] = 2
    case.json["generation_config.json"]["bos_token_id"] = 2
    return case, "bos_token_id is 2 (</s>) in config.json; the tokenizer's is <s> = 1"


def good():
    return tiny()
