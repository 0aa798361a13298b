"""Undo of a fix in place: its receipt is input like any file, and nothing is deleted before hashes were compared."""

import os
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import Message, _
from doctor.fixing import in_place
from doctor.fixing.lock import hold
from doctor.fixing.receipt import RECEIPT, changed_since, is_receipt


def undo_fix(path: str | os.PathLike[str]) -> list[Message]:
    """Put back what a fix in place replaced; returns what was done. Raises PlanRefused, MachineError, BadCheckpoint."""
    path = Path(os.path.abspath(path))
    with hold(path):
        notes = in_place.recover(path)
        if notes and not in_place.kept_name(path).exists():
            return notes
        receipt = Checkpoint.open(path).value(RECEIPT)
        if receipt is None or not is_receipt(receipt):
            raise BadCheckpoint(
                _("{path}: holds no receipt of doctor ({file}), so there is nothing to undo.", path=path, file=RECEIPT)
            )
        in_place.require_kept(path, receipt)
        return [*notes, in_place.undo(path, changed_since(path, receipt, in_place.kept_name(path)))]
