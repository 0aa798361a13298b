"""The result of `doctor compare` as plain data, and back from the JSON that was saved."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from doctor.core.from_json import read_document
from doctor.core.messages import collected
from doctor.core.version import __version__

SCHEMA = "doctor.compare/1"


@dataclass(frozen=True)
class Apart:
    """How much larger the figures of one model are than another's on the same rows, and the spans in which 95 of 100
    resamplings of these rows lie; NaN where there are too few. kl: nats; ratio: of perplexities; top1: a share.
    """

    kl: float
    kl_span: tuple[float, float]
    ratio: float
    ratio_span: tuple[float, float]
    top1: float
    top1_span: tuple[float, float]


@dataclass(frozen=True)
class Contender:
    """One quantized model. kl: nats a token against the original, mean; ratio: its perplexity by the original's. Spans
    hold 95 of 100 resamplings of the rows.
    """

    name: str
    path: str
    stored: str  # gptq 4-bit g128
    bytes: int
    bits: float  # a weight, everything stored counted
    kl: float
    kl_span: tuple[float, float]
    kl_p99: float
    perplexity: float
    ratio: float
    ratio_span: tuple[float, float]
    top1: float
    top1_span: tuple[float, float]
    nonfinite: int  # tokens whose logits have NaN or Inf


@dataclass(frozen=True)
class Difference:
    """How much further from the original a model is than the first one. clear: whether the span of the KL leaves out
    0.
    """

    name: str
    apart: Apart
    clear: bool


@dataclass
class Ranking:
    """Models by their divergence from the original, the closest first; the others' differences from the first."""

    original: str
    original_bytes: int
    perplexity: float  # of the original
    source: str  # of the text
    rows: int
    context: int
    tokens: int
    models: list[Contender]
    differences: list[Difference]
    seconds: float = 0.0
    machine: dict[str, str] = field(default_factory=dict)
    version: str = __version__

    @property
    def ok(self) -> bool:
        """Whether every model computes finite numbers."""
        return not any(model.nonfinite for model in self.models) and math.isfinite(self.perplexity)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        data = {
            **asdict(self),
            "differences": [{"name": d.name, "clear": d.clear, **asdict(d.apart)} for d in self.differences],
        }
        return {"schema": SCHEMA, "messages": collected(data), **data}


def from_dict(document: dict[str, Any]) -> Ranking:
    """The Ranking of a document that `doctor compare -f json` wrote. Raises DoctorError for what is none."""
    rows = document.get("differences")
    nested = (
        [{**row, "apart": row} if isinstance(row, dict) else row for row in rows] if isinstance(rows, list) else rows
    )
    return read_document(Ranking, {**document, "differences": nested}, SCHEMA)
