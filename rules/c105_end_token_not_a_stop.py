"""C105 end-token-not-a-stop: the tokenizer's end token is not among the ids at which generation stops.

Why: the model writes its end token, nothing stops, and it goes on to speak for the user or repeats itself to the limit.
Quantizing is then blamed for it.

Do: let generation_config.json stop at both ids.

False alarms: base models whose tokenizer ends texts with another token than chat templates do are not counted: only the
token that tokenizer_config.json itself calls eos_token is.

Fix safety: safe; a stop is added and none is taken away.

Sources: QwenLM/Qwen1.5 chat models, whose first configs had 151643 where the chat needs 151645; transformers
src/transformers/generation/utils.py (generation_config.json is asked first, config.json where it has none).
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, finding, rule
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
    target = stated
    token = tokenizer.token(stated.ids[0])
    shown = f" ({token})" if token is not None else ""
    yield finding(
        f"generation stops at {', '.join(map(str, stated.ids))}{shown} by {stated.file}; the tokenizer ends texts with {name} = {right}",
        at=Place(stated.file, pointer=stated.pointer, note=f"tokenizer_config.json says {name} = {right}"),
        evidence={"stops": str(list(stated.ids)), "tokenizer": right},
        fix=Fix(
            f'set "eos_token_id": {value} (stop at either)',
            (SetJson(target.file, target.pointer, value, target.value if target.stated else MISSING),),
        ),
    )


def bad():
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = 0
    return case, "generation stops at 0 (<unk>) by generation_config.json; the tokenizer ends texts with </s> = 2"


def good():
    return tiny()
