"""C115 ordinary-end-token: eos_token_id or pad_token_id is an ordinary word.

Why: generation stops at the first such word, in the middle of a sentence. A pad token that is a word is masked out of
texts that contain it, in training and in batches. A config written for another tokenizer has such ids.

Do: write the id of the end token: the one that tokenizer_config.json or the chat template names.

False alarms: a model trained to end its texts with a word, or a tokenizer whose marks are not listed in added_tokens
and look like words.

Fix safety: safe where tokenizer_config.json names the token and tokenizer.json has it: the word's id becomes its id.
Unsafe where it is one of several ids: it is left out. Else manual.

Sources: transformers src/transformers/generation/stopping_criteria.py, EosTokenCriteria.
"""

import re

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import tiny

# <s>, [PAD], <|im_end|>, ▁<pad>, and DeepSeek's wide bars: what tokenizers write for a token that is no word.
MARK = re.compile(r"[<\[{].*[>\]}]|\|.+\||\uff5c|^$|^\s+$|^[▁Ġ]+$|endoftext|^(eos|bos|pad|unk|sep|cls)$", re.IGNORECASE)
WRITES = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")


@rule("C115", "warning", certainty="likely", implied_by=("C103", "C105", "C106"))
def ordinary_end_token(checkpoint, special, tokenizer, spec):
    if not tokenizer.special or not WRITES.search(spec.architecture):
        return
    named = set(special.names.values())
    for stated in special.statements:
        for number in stated.ids if stated.role in ("eos", "pad") else ():
            text = tokenizer.token(number)
            if text is None or text in tokenizer.added or text in named or MARK.search(text):
                continue
            yield finding(
                _(
                    "{key} {id} in {file} is the ordinary token {token!r}",
                    key=f"{stated.role}_token_id",
                    id=number,
                    file=stated.file,
                    token=text,
                ),
                at=Place(stated.file, pointer=stated.pointer),
                evidence={"id": number, "token": text},
                fix=_fix(special, tokenizer, stated, number),
                severity="" if stated.role == "eos" else "info",
            )


def _fix(special, tokenizer, stated, number):
    key, name = f"{stated.role}_token_id", special.names.get(stated.role)
    right = tokenizer.ids.get(name)
    if isinstance(stated.value, list) and len(stated.ids) > 1:
        rest = [i for i in stated.value if i != number]
        title = _('set "{key}": {value}', key=key, value=rest)
        return Fix(title, (SetJson(stated.file, stated.pointer, rest, stated.value),), "unsafe")
    if right is None:
        return Fix(_("write the id of the token that ends a text"), (), "manual")
    value = [right] if isinstance(stated.value, list) else right
    title = _('set "{key}": {value} ({token} in tokenizer.json)', key=key, value=value, token=name)
    return Fix(title, (SetJson(stated.file, stated.pointer, value, stated.value),))


def bad():
    case = tiny()
    case.json["generation_config.json"]["eos_token_id"] = [2, 50]
    return case, "eos_token_id 50 in generation_config.json is the ordinary token 'P'"


def good():
    return tiny()


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny()
    case.config["pad_token_id"] = 50
    yield case
