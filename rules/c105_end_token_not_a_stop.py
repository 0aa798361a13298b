"""C105 end-token-not-a-stop: tokenizer's EOS token does not stop generation.

Why: the model generates its end token, nothing stops, and it continues with the user's turn or repeats itself up to the
limit. Quantization is then blamed for it.

Do: let generation_config.json stop at both ids.

False alarms: base models whose tokenizer ends texts with another token than chat templates do are not counted: only the
token that tokenizer_config.json itself names as eos_token is.

Fix safety: safe: a stop token is added and none is removed.

Sources: QwenLM/Qwen1.5 chat models, whose first configs had 151643 where the chat needs 151645; transformers
src/transformers/generation/utils.py (generation_config.json is read first, config.json where it has none).
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny


@rule("C105", "warning", implied_by=("C103", "C106"))
def end_token_not_a_stop(checkpoint, special, tokenizer, generation_config):
    name = special.names.get("eos")
    right = tokenizer.ids.get(name)
    stated = special.of("generation_config.json", "eos")
    if not stated.ids:
        stated = special.of("config.json", "eos")
    if right is None or not stated.ids or right in stated.ids:
        return
    value = [right, *stated.ids]
    token = tokenizer.token(stated.ids[0])
    stops = ", ".join(map(str, stated.ids))
    yield finding(
        _(
            "{file} stops generation at {stops}; the tokenizer's end token is {name} = {right}",
            file=stated.file,
            stops=stops,
            name=name,
            right=right,
        )
        if token is None
        else _(
            "{file} stops generation at {stops} ({token}); the tokenizer's end token is {name} = {right}",
            file=stated.file,
            stops=stops,
            token=token,
            name=name,
            right=right,
        ),
        at=Place(
            stated.file,
            pointer=stated.pointer,
            note=_("tokenizer_config.json: {token} = {id}", token=name, id=right),
        ),
        evidence={"stops": str(list(stated.ids)), "tokenizer": right},
        fix=Fix(
            _('set "{key}": {value} (stop at either)', key="eos_token_id", value=value),
            (SetJson(stated.file, stated.pointer, value, stated.value if stated.stated else MISSING),),
        ),
    )


def bad():
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 0
    return case, "generation_config.json stops generation at 0 (<unk>); the tokenizer's end token is </s> = 2"


def good():
    return tiny()
