"""C106 malformed-special-id: special token id is not an integer.

Why: an id is an index. With a string like "151643", a fraction, a list where one id is required, or an object, readers
stop, or the id is unequal to every token and generation never ends.

Seen as:
- Python: `TypeError: 'list' object cannot be interpreted as an integer`
- PyTorch: `TypeError: new(): invalid data type 'str'`
- huggingface_hub: `StrictDataclassFieldValidationError`

Do: write the number.

False alarms: a list of ids is allowed for eos_token_id alone.

Fix safety: safe where the number is unambiguous ("2", 2.0); else manual.

Sources: AutoGPTQ auto_gptq/modeling/_base.py:275 (a list as pad id); transformers
src/transformers/generation/configuration_utils.py.
"""

from doctor.lint.rule import Fix, Place, SetJson, _, finding, rule
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
        key, shown = f"{stated.role}_token_id", str(value)[:60]
        edit = SetJson(stated.file, stated.pointer, right, value)
        yield finding(
            _(
                "{key} is {value!r} in {file}; it must be a whole number or a list of whole numbers",
                key=key,
                value=shown,
                file=stated.file,
            )
            if stated.role == "eos"
            else _("{key} is {value!r} in {file}; it must be a whole number", key=key, value=shown, file=stated.file),
            at=Place(stated.file, pointer=stated.pointer),
            evidence={"value": shown},
            fix=Fix(_('set "{key}": {value}', key=key, value=right), (edit,))
            if right is not None
            else Fix(_("write the id of the token in tokenizer.json"), (), "manual"),
        )


def _is_id(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value):
    """The whole number that the value unambiguously means, None where there is none."""
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
