"""C112 special-token-unknown: special token in tokenizer_config.json is not in tokenizer.json.

Why: transformers adds the text as a new token with the next free id, for which the embedding has no trained row, or
none at all. A text that ends with it then stops the program or means nothing to the model.

Seen as:
- PyTorch: `IndexError: index out of range in self`
- transformers: `Special tokens have been added in the vocabulary`

Do: name a token that tokenizer.json has: the one that the base model names.

False alarms: none known; tokens listed under added_tokens_decoder count as known.

Fix safety: unsafe: the token whose id config.json and generation_config.json state, or with `--from` the one that the
donor names. Else manual.

Sources: transformers src/transformers/tokenization_utils_base.py, `add_special_tokens`.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule, token_text, value_from_base
from doctor.lint.testing import tiny


@rule("C112", "warning")
def special_token_unknown(checkpoint, special, tokenizer, tokenizer_config, base):
    added = (tokenizer_config or {}).get("added_tokens_decoder")
    known = {t.get("content") for t in added.values() if isinstance(t, dict)} if isinstance(added, dict) else set()
    for role, name in special.names.items():
        if name not in tokenizer.ids and name not in known:
            yield finding(
                _(
                    "{key} is {token!r} in tokenizer_config.json; tokenizer.json has no such token",
                    key=f"{role}_token",
                    token=name,
                ),
                at=Place("tokenizer_config.json", pointer=f"/{role}_token"),
                evidence={"token": name},
                fix=_fix(role, special, tokenizer, tokenizer_config[f"{role}_token"], base),
            )


def _fix(role, special, tokenizer, stated, base):
    ids = {i for file in ("config.json", "generation_config.json") for i in special.of(file, role).ids[:1]}
    name = tokenizer.token(ids.pop()) if len(ids) == 1 else None
    pointer, otherwise = f"/{role}_token", _("name the token that the base model names")
    if name is not None:
        edit = SetJson("tokenizer_config.json", pointer, name, stated)
        title = _('set "{key}": "{value}" (the configs state its id)', key=f"{role}_token", value=name)
        return Fix(title, (edit,), "unsafe")
    known = base is not None and token_text(base.value("tokenizer_config.json", pointer)) in tokenizer.ids
    return value_from_base(base if known else None, "tokenizer_config.json", pointer, stated, otherwise)


def bad():
    case = tiny()
    case.json["tokenizer_config.json"]["pad_token"] = "[PAD]"
    return case, "pad_token is '[PAD]' in tokenizer_config.json; tokenizer.json has no such token"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case, _message = bad()
    for name in ("config.json", "generation_config.json"):
        case.json[name]["pad_token_id"] = None
    yield case
