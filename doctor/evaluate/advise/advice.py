"""The result of `doctor advise` as plain data, and back from the JSON that was saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from doctor.core.from_json import read_document
from doctor.core.messages import collected
from doctor.core.version import __version__

SCHEMA = "doctor.advice/1"


@dataclass(frozen=True)
class Engine:
    """Of one GPU. memory: bytes that it has; usable: those that the engine uses; own: what it holds of them beside
    weights and cache.
    """

    memory: int
    usable: int
    context: int  # CUDA's context, libraries, graphs: the table's assumption
    step: int
    tokens: int

    @property
    def own(self) -> int:
        return self.context + self.step


@dataclass(frozen=True)
class Option:
    """One way to serve. Bytes are of one GPU. longest: tokens of one sequence that the rest of the memory holds, at
    most the model's positions; None for any. sequences: of the context asked for. blocked: why it would not run, []
    where nothing says so.
    """

    scheme: str
    gpus: int
    cache: str
    weight_bytes: int
    cache_bytes: int
    engine_bytes: int
    usable_bytes: int
    free_bytes: int
    bits: float
    total_bytes: int  # of all weights
    fits: bool
    longest: int | None
    sequences: int
    order: int  # place in the table of quality, best first
    kl: float | None
    perplexity: float | None
    measured_on: str
    weights_alone: bool
    published: str
    blocked: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    quantize: str
    serve: str

    @property
    def rank(self) -> tuple:
        """What fits and runs first, then what fits only; by quality, then fewer GPUs, then a wider cache. Of what does
        not fit, the nearest first.
        """
        wanting = 0 if self.fits else -self.free_bytes
        return (not self.fits, bool(self.blocked), self.order, wanting, self.gpus, -self.cache_bytes)

    @property
    def good(self) -> bool:
        """Whether it fits and nothing says that it would not run."""
        return self.fits and not self.blocked


@dataclass
class Advice:
    """Everything that `doctor advise` found. options: best first; of each scheme the first that fits is `best`."""

    checkpoint: str
    path: str
    architecture: str
    parameters: int
    stored_bytes: int
    runtime: str
    engine_version: str
    gpu: str
    gpus: int
    memory: int
    context: int
    batch: int
    engine: Engine
    options: list[Option]
    notes: list[str]
    version: str = __version__

    @property
    def best(self) -> list[Option]:
        """Of each scheme its first option, those that fit before the others."""
        seen: dict[str, Option] = {}
        for option in self.options:
            seen.setdefault(option.scheme, option)
        return list(seen.values())

    @property
    def fitting(self) -> list[Option]:
        """Those of `best` that fit and run."""
        return [option for option in self.best if option.good]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        data = {**asdict(self), "best": [asdict(o) for o in self.best]}
        return {"schema": SCHEMA, "messages": collected(data), **data}


def from_dict(document: dict[str, Any]) -> Advice:
    """The Advice of a document that `doctor advise -f json` wrote. Raises DoctorError for what is none."""
    return read_document(Advice, document, SCHEMA)
