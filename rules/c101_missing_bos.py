"""C101 missing-bos: config.json has no BOS token, though the tokenizer or family has one.

Why: calibration rows and prompts start with this id. Without it, some tools crash on None, some silently use id 1, and
some leave it out. The model is then calibrated on text that never starts the way it was trained.

Seen as:
- ExLlamaV2: `RuntimeError: Could not infer dtype of NoneType`
- ExLlamaV2: `TypeError: 'NoneType' object cannot be interpreted as an integer`

Do: write the id that the checkpoint's own tokenizer has. For Qwen that is <|endoftext|> (151643), as its vendor ships
it. The often quoted 151644 is <|im_start|>, a chat token: it stops the crash, and adds a second turn start before the
first.

False alarms: families that have no BOS at all are not reported (GLM, MPT, OLMo). It is a note where transformers uses
the same id by default and tokenizer_config.json states it too (Gemma 3 is published like this). It is a warning where
only config.json could state it: programs that read the file themselves do not know the class's default.

Fix safety: safe: one key of config.json, with an id that the tokenizer has. The weights stay as they are.

Sources: turboderp/exllamav2 issue 453 and exllamav2/tokenizer/tokenizer.py (0.0.21: line 415); QwenLM/Qwen3 issue 369
and docs/source/getting_started/concepts.md; QwenLM/Qwen tokenization_note.md.
"""

from doctor.lint.rule import MISSING, TURN_MARKS, Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny


@rule("C101", "error")
def missing_bos(checkpoint, special, tokenizer, embedding_rows):
    stated = special.of("config.json", "bos")
    if stated.value is not None or special.ships_bos is False:
        return
    evidence = [e for e in _evidence(special, tokenizer) if embedding_rows is None or e[2] < embedding_rows]
    if not evidence:
        return
    source, token, number = evidence[0]
    same_by_default = not stated.stated and special.class_default("bos") == number
    others = [e[0] for e in evidence[1:] if e[2] == number]
    note = (
        _("{source} has {token} = {id}; so does {other}", source=source, token=token, id=number, other=others[0])
        if others
        else _("{source} has {token} = {id}", source=source, token=token, id=number)
    )
    known = same_by_default and source == "tokenizer_config.json"
    yield finding(
        _("bos_token_id is null in config.json; {source} has {token} = {id}", source=source, token=token, id=number)
        if stated.stated
        else _(
            "bos_token_id is absent in config.json; {source} has {token} = {id}", source=source, token=token, id=number
        ),
        at=Place("config.json", pointer=stated.pointer, note=note),
        evidence={"token": token, "id": number},
        severity="info" if known else "" if special.ships_bos and not same_by_default else "warning",
        fix=Fix(
            _(
                'set "{key}": {value} ({token}, by {file}; weights untouched)',
                key="bos_token_id",
                value=number,
                token=token,
                file=source,
            ),
            (SetJson("config.json", stated.pointer, number, None if stated.stated else MISSING),),
        ),
    )


def _evidence(special, tokenizer):
    """(source, token, id), best first. A chat token is no evidence for Qwen, whose vendor states that it is not the
    BOS.
    """
    refused = TURN_MARKS if special.model_type.startswith("qwen") else frozenset()
    found = []
    name = special.names.get("bos")
    if name in tokenizer.ids:
        found.append(("tokenizer_config.json", name, tokenizer.ids[name]))
    for number in special.of("generation_config.json", "bos").ids:
        if tokenizer.token(number) is not None:
            found.append(("generation_config.json", tokenizer.token(number), number))
    if tokenizer.bos_added in tokenizer.ids:
        found.append(("tokenizer.json", tokenizer.bos_added, tokenizer.ids[tokenizer.bos_added]))
    for entry in special.families:
        bos = entry.get("bos")
        if isinstance(bos, list) and len(bos) == 2 and tokenizer.ids.get(bos[1]) == bos[0]:
            found.append((_("the {family} table", family=special.model_type), bos[1], bos[0]))
    return [e for e in found if e[1] not in refused]


def bad():
    case = tiny()
    case.config["bos_token_id"] = None
    return case, "bos_token_id is null in config.json; tokenizer_config.json has <s> = 1"


def good():
    return tiny()
