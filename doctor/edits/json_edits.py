"""Edits of JSON texts: values are set and removed in place, the rest of the text is untouched."""

import json

from doctor.checkpoint import json_text
from doctor.core.messages import _
from doctor.edits.kinds import MISSING, RemoveJson, SetJson
from doctor.edits.stale import stale


def edited_text(text: str, edit: SetJson | RemoveJson) -> str:
    """The text after one edit. Raises PlanRefused where the present value is not the one that the edit expects."""
    now = _value_at(json.loads(text.removeprefix("\ufeff")), edit.pointer)
    anything = isinstance(edit, RemoveJson) and edit.expect is None
    if not (now is not MISSING if anything else same_json(now, edit.expect)):
        raise stale(
            _(
                "{where}: {found}; the edit expects {expected}.",
                where=edit.target,
                found=json_shown(now),
                expected=_("a value") if anything else json_shown(edit.expect),
            )
        )
    try:
        if isinstance(edit, SetJson):
            return json_text.set_value(text, edit.pointer, edit.value)
        return json_text.remove_value(text, edit.pointer)
    except KeyError as error:
        raise stale(
            _(
                "{where}: {parent} is not an object, so it cannot hold the key.",
                where=edit.target,
                parent=error.args[0] or _("the document"),
            )
        ) from None


def _value_at(value: object, pointer: str) -> object:
    for key in json_text.split_pointer(pointer):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def same_json(a: object, b: object) -> bool:
    """Equal as JSON: 1 differs from 1.0 and from true, NaN equals NaN."""
    if a is MISSING or b is MISSING:
        return a is b
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def json_shown(value: object) -> str:
    """A JSON value in a message, at most 80 characters."""
    if value is MISSING:
        return _("no value")
    text = json_text.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
