"""C104 bos-disagrees: config.json and the tokenizer have different BOS tokens.

Why: which token a text begins with depends on the program: some ask the tokenizer, some read config.json. Calibrating
with one and serving with the other shifts every activation that follows.

Do: use the tokenizer's token, because training texts were made with it.

False alarms: DeepSeek's distilled Qwen models ship such a pair. Where generation_config.json agrees with the tokenizer,
the severity is only info.

Fix safety: unsafe: that the tokenizer is right is likely, not certain.

Sources: turboderp/exllamav2 exllamav2/tokenizer/tokenizer.py (config first); transformers
src/transformers/tokenization_utils_base.py.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule
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
    number = stated.ids[0]
    yield finding(
        _(
            "bos_token_id is {id} in config.json; the tokenizer's is {name} = {right}",
            id=number,
            name=name,
            right=right,
        )
        if token is None
        else _(
            "bos_token_id is {id} ({token}) in config.json; the tokenizer's is {name} = {right}",
            id=number,
            token=token,
            name=name,
            right=right,
        ),
        at=Place(
            "config.json",
            pointer=stated.pointer,
            note=_("tokenizer_config.json: {token} = {id}", token=name, id=right),
        ),
        evidence={"config": number, "tokenizer": right},
        severity="info" if backed else "",
        fix=Fix(
            _('set "{key}": {value} ({token})', key="bos_token_id", value=right, token=name),
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
