"""Measures disk and memory of this machine against what quantizing a checkpoint takes. Reads headers and the system,
loads no weights.
"""

import os
from pathlib import Path
from typing import cast

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError
from doctor.core.machine import GIVEN_MACHINE, Machine
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.core.store import Store
from doctor.model.spec import ModelSpec
from doctor.quant.budget import BATCH_TOKENS, free_memory, needs
from doctor.quant.stage import Stage
from doctor.scan.header import SPEC


def put_machine(checkpoint: Checkpoint, store: Store, recipe: Recipe, output: str | os.PathLike) -> None:
    """Add the fact of what this machine has and what quantizing into `output` needs, where config.json describes a
    model.
    """
    if store.has(SPEC):
        store.put(GIVEN_MACHINE, measure(checkpoint, cast("ModelSpec", store.get(SPEC)), recipe, output))


def measure(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe, output: str | os.PathLike) -> Machine:
    """Machine for an output in `output`, which need not exist yet. Raises MachineError where its disk cannot be
    asked.
    """
    rows = int(recipe.calibrated)
    need = needs(checkpoint, spec, recipe, rows, BATCH_TOKENS)
    place = Path(os.path.abspath(output))
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        disk = os.statvfs(place)
    except OSError as error:
        raise MachineError(
            _("{path}: {why}.", path=str(place), why=error.strerror),
            _("Name a directory on the disk that will hold the output."),
        ) from None
    there = Stage(Path(os.path.abspath(output))).bytes_there()  # of a run that may be resumed
    return Machine(str(output), free_memory(), need.fixed, disk.f_bavail * disk.f_frsize + there, need.disk)
