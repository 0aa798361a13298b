"""What a proof found: the logits before and after a fix that changes shapes. evaluate/proof.py runs the model."""

from dataclasses import dataclass
from typing import Literal

PROOF_PROMPTS = 4  # rows of token ids on which a proof compares logits


@dataclass(frozen=True)
class Proof:
    """Logits before and after the edits of a plan. status "equal" means bit-equal, "agrees" equal to float32
    rounding.
    """

    status: Literal["equal", "agrees", "differs", "not run"]
    detail: str
    max_difference: float | None = None
    largest_logit: float | None = None
    prompts: int = 0
    blocks: int | None = None  # decoder layers compared, where not all were
