"""What is known of weights in codes that are read as floats."""

from __future__ import annotations

from dataclasses import dataclass

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.messages import Message
from doctor.core.recipe import Scheme
from doctor.edits.kinds import Edit
from doctor.formats.base import Format


@dataclass(frozen=True)
class Stored:
    """One weight in codes. codes: the tensor that holds them."""

    codes: TensorInfo
    weight: str
    shape: tuple[int, ...]
    format: Format
    scheme: Scheme

    @property
    def module(self) -> str:
        return self.weight.removesuffix(".weight")


@dataclass(frozen=True)
class Decoding:
    """All weights in codes, and the edits that make them plain numbers of dtype `kind`. notes: what is lost."""

    stored: tuple[Stored, ...]
    edits: tuple[Edit, ...]
    kind: str
    notes: tuple[Message, ...] = ()

    @property
    def label(self) -> str:
        """The formats, as people write them."""
        return ", ".join(dict.fromkeys(s.format.label for s in self.stored))
