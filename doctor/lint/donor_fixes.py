"""Fixes that take what is lost or broken from the checkpoint of --from: a file, a tensor, a JSON value."""

from doctor.core.finding import Fix
from doctor.core.messages import _
from doctor.edits.kinds import MISSING, SetJson


def from_base(base, name: str, otherwise: str) -> Fix:
    """A whole file from the donor (--from): safe if evidence shows that it is the lost one. Without a donor,
    `otherwise` tells the user what to do.
    """
    offer = base.offer_file(name) if base is not None else None
    if offer is None:
        return Fix(otherwise, (), "manual")
    edit, why = offer
    if why:
        return Fix(_("take {name} from {base}: {why}", name=name, base=base.text, why=why), (edit,), "safe")
    return Fix(_("take {name} from {base}", name=name, base=base.text), (edit,), "unsafe")


def tensor_from_base(base, tensor) -> Fix | None:
    """This tensor from the donor, in the same dtype and shape: unsafe, because it may have been trained here."""
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    return edit and Fix(_("take the tensor from {base}", base=base.text), (edit,), "unsafe")


def zeros_from_base(base, tensor) -> Fix | None:
    """This tensor from the donor, where only zeros here differ: unsafe, because pruning makes such zeros too."""
    edit = base.offer(tensor.name, tensor.dtype.name, tensor.shape) if base is not None else None
    why = base.fills(tensor) if edit is not None else ""
    return Fix(_("take the tensor from {base}: {why}", base=base.text, why=why), (edit,), "unsafe") if why else None


def value_from_base(base, file: str, pointer: str, now: object, otherwise: str) -> Fix:
    """One JSON value from the donor: unsafe, because a fine-tune may have changed it. Without a donor, `otherwise` says
    what to do.
    """
    value = base.value(file, pointer) if base is not None else MISSING
    if value is MISSING or value == now or value != value:
        return Fix(otherwise, (), "manual")
    key = pointer.rpartition("/")[2]
    return Fix(
        _('set "{key}" as {base} has it', key=key, base=base.text), (SetJson(file, pointer, value, now),), "unsafe"
    )


def chat_template_fix(checkpoint, base, own: bool) -> Fix:
    """The donor's chat template, from the same file and key. own: it is in chat_template.jinja."""
    manual = _("repair the template, or take the base model's")
    theirs = (base.checkpoint.value("tokenizer_config.json") or {}).get("chat_template") if base is not None else None
    mine = (checkpoint.value("tokenizer_config.json") or {}).get("chat_template")
    if own or not isinstance(theirs, str):
        return from_base(base if own else None, "chat_template.jinja", manual)
    return Fix(
        _("take the chat template of {base}", base=base.text),
        (SetJson("tokenizer_config.json", "/chat_template", theirs, mine),),
        "unsafe",
    )
