"""How long a run takes, step by step, before it begins: work counted from headers, divided by rates measured here.

The counts are those that `auto` tuning compares (tuning/wanted.py): products of a token and a weight. Norms, attention
over long rows, AWQ's search and what other programs take are not in it: a figure tells a night from a week and is no
promise for a minute. SmolLM2-135M on 16 rows, one thread, in seconds of the processor, foreseen and taken without
the comparison at the end: 156, 185 (start 16, 22; sampling 21, 19; layers 53, 59; tuning 65, 84; output 1, 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe
from doctor.model.spec import ModelSpec
from doctor.quant.rates import Rates
from doctor.quant.tuning.wanted import comparing_work, layers_work, training_work

STARTING = 20.0  # seconds: imports here and in the processes that rehearse and load, on one core
READS, WRITES = 3, 2  # times that the source is read (check, layers, hashes), and that the output is written and read
COMPARED_TOKENS = 512  # of a row that the output is compared on
SAMPLING = 2  # of the products alone: keys and values of single tokens, probabilities
COMPARING = 1.5  # of the two models' outputs: the float16 range, the layers alone, a few replies


@dataclass(frozen=True)
class Step:
    """One step of a run and how long it takes, in seconds."""

    name: str | Message
    seconds: float


def steps(
    spec: ModelSpec,
    recipe: Recipe,
    rates: Rates,
    *,
    source: int,
    output: int,
    rows: int,
    length: int,
    sampled: int,
    trained: int,
    through: int,
    a_step: int,
    compared: int,
) -> tuple[Step, ...]:
    """source, output: bytes. rows of `length` tokens calibrate; sampled: tokens that the model writes of them; trained:
    rows that tuning trains on, 0 for none, `through` of them from end to end, after steps of a layer on `a_step` rows;
    compared: rows that the output is compared on. Steps that are not done are left out.
    """
    passes, solving = layers_work(recipe, spec, rows * length)
    watching, training = training_work(spec, trained, through, length, a_step)
    found = [
        (_("start, check and rehearsal"), STARTING + _over(READS * source, rates.reading)),
        (_("rows that the model writes"), SAMPLING * _over(comparing_work(spec, sampled), rates.narrow)),
        (_("outputs and Hessians of all layers"), passes / rates.wide if rows else 0.0),
        (_("codes of all linears"), _over(solving, rates.solving)),
        (_("tuning of scales"), (watching + training) / rates.wide if trained else 0.0),
        (_("writing and checking the output"), _over(WRITES * output, rates.writing) + _over(output, rates.reading)),
        (
            _("comparing it with the original"),
            COMPARING * 2 * comparing_work(spec, compared * COMPARED_TOKENS) / rates.wide,
        ),
    ]
    return tuple(Step(name, seconds) for name, seconds in found if seconds > 0)


def _over(work: float, rate: float) -> float:
    """Seconds; 0 where the rate is not known."""
    return work / rate if rate else 0.0
