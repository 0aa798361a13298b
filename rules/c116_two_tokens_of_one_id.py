"""C116 two-tokens-of-one-id: two tokens of tokenizer.json have one id.

Why: the model has one row for both. Which text an id becomes depends on the reader, and a special token that shares its
id with a word is read wherever the word stands.

Do: give each token the id of its own row; take tokenizer.json from the base model where it was edited by hand.

False alarms: a token that was renamed on purpose in added_tokens alone, over a reserved one, works in some readers.

Fix safety: unsafe, and only with `--from`: the donor's tokenizer.json is used. Else manual: which text the row was
trained for is not in the files.

Sources: huggingface/tokenizers tokenizers/src/tokenizer/added_vocabulary.rs.
"""

from doctor.lint.rule import Place, _, finding, from_base, plural, rule
from doctor.lint.testing import tiny


@rule("C116", "warning")
def two_tokens_of_one_id(checkpoint, tokenizer, base):
    texts: dict[int, str] = {}
    twice = []
    for text, number in tokenizer.ids.items():
        if texts.setdefault(number, text) != text:
            twice.append((number, texts[number], text))
    if twice:
        number, first, second = min(twice)
        yield finding(
            plural(
                "{n:,} id of tokenizer.json has two tokens: {id} is {first!r} and {second!r}",
                "{n:,} ids of tokenizer.json have two tokens, such as {id}: {first!r} and {second!r}",
                len({number for number, _first, _second in twice}),
                id=number,
                first=first,
                second=second,
            ),
            at=Place("tokenizer.json"),
            evidence={"ids": len(twice)},
            fix=from_base(base, "tokenizer.json", _("give each token an id of its own, or take the base model's file")),
        )


def bad():
    case = tiny()
    case.json["tokenizer.json"]["model"]["vocab"]["!"] = 5
    return case, "1 id of tokenizer.json has two tokens: 5 is '!' and '#'"


def good():
    return tiny()
