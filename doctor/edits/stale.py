"""The refusal of edits that were made for another state of the files."""

from doctor.core.errors import PlanRefused
from doctor.core.messages import Message, _


def stale(message: Message) -> PlanRefused:
    """PlanRefused with the advice to plan again: an edit expects something that the files no longer hold."""
    return PlanRefused(message, _("The edits were made for another state of the files: run `doctor fix` again."))
