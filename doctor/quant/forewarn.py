"""What is said before the first layer: how this machine computes, and whether memory and disk suffice."""

from __future__ import annotations

from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.formats.known import streams
from doctor.quant import budget
from doctor.quant.device import device_free
from doctor.quant.prepare import Asked, Calibrated
from doctor.quant.setup import computing_notes
from doctor.quant.stage import Stage, require_room
from doctor.quant.vision import require_images


def forewarn(asked: Asked, calibrated: Calibrated) -> list[str]:
    """Notes on how this machine computes. Raises MachineError where memory cannot suffice, DoctorError without a
    config.
    """
    checked, checkpoint = calibrated.checked, calibrated.checked.assessment.checkpoint
    if "config.json" not in checkpoint.json:
        raise DoctorError(
            _("{root}: has no config.json; quantizing needs the model's shape.", root=str(checkpoint.root)),
            _("Give the checkpoint's directory."),
        )
    notes = computing_notes(checkpoint, checked.spec, checked.recipe, asked.device)
    for note in notes:
        asked.progress(note)
    rows = calibrated.rows
    require_images(checked.recipe, rows)
    free = None if streams(checked.recipe) else device_free(asked.device)
    length = max(map(len, rows), default=0)
    need = budget.needs(checkpoint, checked.spec, checked.recipe, len(rows), length, asked.memory, free)
    if not streams(checked.recipe):  # which holds a few MiB of a tensor, and sees to its own room
        budget.require(need, asked.memory)
        hidden = need.hidden if need.hidden > budget.left(need, asked.memory) else 0
        place = next(p for p in asked.output.parents if p.exists())
        require_room(place, max(0, need.disk - Stage(asked.output).bytes_there()) + hidden)
    if free is not None:
        fits = _(
            "{device}: up to {need:.2f} GiB are needed, {free:.2f} GiB are free",
            device=asked.device,
            need=need.on_device / 2**30,
            free=free / 2**30,
        )
        asked.progress(
            fits
            if need.on_device <= free
            else _("{fits}: it may run out of memory; finished layers are kept for --resume", fits=fits)
        )
    return notes
