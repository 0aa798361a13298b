"""C112 special-token-unknown: tokenizer_config.json names a special token that the tokenizer does not have.

Why: transformers adds the text as a new token with the next free id, for which the embedding has no trained row, or
none at all. A text that ends with it then stops the program or means nothing to the model.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- transformers: `Special tokens have been added in the vocabulary`

Do: name a token that is in tokenizer.json, the one the base model names.

False alarms: none known; tokens listed under added_tokens_decoder count as there.

Fix safety: unsafe: the token whose id config.json and generation_config.json state, or with `--from` the one that the
base model names. Else manual.

Sources: transformers src/transformers/tokenization_utils_base.py, `add_special_tokens`.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule, token_text, value_from_base
from doctor.lint.testing import tiny


@rule("C112", "warning")
def special_token_unknown(checkpoint, special, tokenizer, tokenizer_config, base):
    listed = (tokenizer_config or {}).get("added_tokens_decoder")
    listed = {t.get("content") for t in listed.values() if isinstance(t, dict)} if isinstance(listed, dict) else set()
    for role, name in special.names.items():
        if name not in tokenizer.ids and name not in listed:
            yield finding(
                f"{role}_token is {name!r} in tokenizer_config.json; tokenizer.json has no such token",
                at=Place("tokenizer_config.json", pointer=f"/{role}_token"),
                evidence={"token": name},
                fix=_fix(role, special, tokenizer, tokenizer_config[f"{role}_token"], base),
            )


def _fix(role, special, tokenizer, stated, base):
    ids = {i for file in ("config.json", "generation_config.json") for i in special.of(file, role).ids[:1]}
    name = tokenizer.token(ids.pop()) if len(ids) == 1 else None
    pointer, otherwise = f"/{role}_token", "name the token that the base model names"
    if name is not None:
        edit = SetJson("tokenizer_config.json", pointer, name, stated)
        return Fix(f'set "{role}_token": "{name}", whose id the configs state', (edit,), "unsafe")
    known = base is not None and token_text(base.value("tokenizer_config.json", pointer)) in tokenizer.ids
    return value_from_base(base if known else None, "tokenizer_config.json", pointer, stated, otherwise)


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["pad_token"] = "[PAD]"
    return case, "pad_token is '[PAD]' in tokenizer_config.json; tokenizer.json has no such token"


def good():
    return tiny()


def more():
    """Cases whose cures the example above does not show."""
    case, _ = bad()
    for name in ("config.json", "generation_config.json"):
        case.json[name]["pad_token_id"] = None
    yield case
