"""C106 malformed-special-id: a special token's id is not a whole number.

Why: an id is an index. A text like "151643", a fraction, a list where one id must stand, or an object make readers
stop, or compare unequal to every token, so that generation never ends.

Seen as:
- Python: `TypeError: 'list' object cannot be interpreted as an integer`
- PyTorch: `TypeError: new(): invalid data type 'str'`
- huggingface_hub: `StrictDataclassFieldValidationError`

Do: write the number.

False alarms: a list of ids is legal for eos_token_id alone.

Fix safety: safe where the number is beyond doubt ("2", 2.0); else manual.

Sources: AutoGPTQ auto_gptq/modeling/_base.py:275 (a list as pad id); transformers
src/transformers/generation/configuration_utils.py.
"""

from doctor.lint.rule import Fix, Place, SetJson, finding, rule
from doctor.lint.testing import tiny


@rule("C106", "error")
def malformed_special_id(checkpoint, special):
    for stated in special.statements:
        value = stated.value
        if value is None or _is_id(value):
            continue
        if stated.role == "eos" and isinstance(value, list) and value and all(map(_is_id, value)):
            continue
        right = _number(value)
        must = "a whole number or a list of them" if stated.role == "eos" else "a whole number"
        yield finding(
            f"{stated.role}_token_id is {str(value)[:60]!r} in {stated.file}; it must be {must}",
            at=Place(stated.file, pointer=stated.pointer),
            evidence={"value": str(value)[:60]},
            fix=Fix(f'set "{stated.role}_token_id": {right}', (SetJson(stated.file, stated.pointer, right, value),))
            if right is not None
            else Fix("write the id of the token in tokenizer.json", (), "manual"),
        )


def _is_id(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value):
    """The whole number that is meant beyond doubt, None where there is none."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if _is_id(value) else None


def bad():
    case = tiny()
    case.config["pad_token_id"] = "0"
    return case, "pad_token_id is '0' in config.json; it must be a whole number"


def good():
    return tiny()
