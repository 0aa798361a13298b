"""Who is asked about an output, and what compares two. Their modules import torch, so they are imported late."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe

if TYPE_CHECKING:
    from doctor.core.records import LoadProof
    from doctor.fixing.proof import Proof
    from doctor.quant.client import Client


def prove_logits(before: Checkpoint, after: Checkpoint) -> Proof:
    """The proof of shape fixes; its module imports torch."""
    from doctor.evaluate.proof import prove

    return prove(before, after)


def load_proof() -> Callable[[Path], LoadProof] | None:
    """What asks transformers to load a directory; None where that is turned off."""
    if os.environ.get("DOCTOR_LOAD_PROOF") == "0":
        return None
    from doctor.evaluate.clients.load_proof import prove_loading

    return prove_loading


def client(recipe: Recipe | None = None) -> Client | None:
    """Who is asked about an output; None where that is turned off."""
    from doctor.evaluate.clients.rehearsal import client_of

    return None if os.environ.get("DOCTOR_LOAD_PROOF") == "0" else client_of(recipe or Recipe())
