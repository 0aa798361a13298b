"""Fixes that take what is lost or broken from the checkpoint of --from: a file, a tensor, a JSON value."""

from doctor.core.finding import Fix
from doctor.core.messages import _
from doctor.edits.kinds import MISSING, SetJson


def from_base(base, name: str, otherwise: str) -> Fix:
    """Take a whole file from the checkpoint of --from: safe if something proves that it is the lost file, else unsafe.

    Without such a file, a manual fix with the sentence `otherwise`.
    """
    offer = base.offer_file(name) if base is not None else None
    if offer is None:
        return Fix(otherwise, (), "manual")
    edit, why = offer
    title = (
        _("take {file} from {donor}: {why}", file=name, donor=base.text, why=why)
        if why
        else _("take {file} from {donor}", file=name, donor=base.text)
    )
    return Fix(title, (edit,), "safe" if why else "unsafe")


def tensor_from_base(base, tensor) -> Fix | None:
    """Take the tensor from the checkpoint of --from, if dtype and shape agree. Unsafe: a fine-tune may have changed it."""
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    return edit and Fix(_("take the tensor from {donor}", donor=base.text), (edit,), "unsafe")


def zeros_from_base(base, tensor) -> Fix | None:
    """Take the tensor from the checkpoint of --from, if the two differ only where this one is 0.

    Unsafe: pruning makes such zeros too.
    """
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    found = base.fills(tensor) if edit is not None else ""
    return (
        Fix(_("take the tensor from {donor}: {why}", donor=base.text, why=found), (edit,), "unsafe") if found else None
    )


def value_from_base(base, file: str, pointer: str, now: object, otherwise: str) -> Fix:
    """Set one JSON value as the checkpoint of --from has it. Unsafe: a fine-tune may have changed it.

    Without such a value, a manual fix with the sentence `otherwise`.
    """
    value = base.value(file, pointer) if base is not None else MISSING
    if value is MISSING or value == now or value != value:
        return Fix(otherwise, (), "manual")
    key = pointer.rpartition("/")[2]
    title = _('set "{key}" as {donor} has it', key=key, donor=base.text)
    return Fix(title, (SetJson(file, pointer, value, now),), "unsafe")
