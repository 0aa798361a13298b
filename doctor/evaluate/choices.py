"""The task that needs no network: sentences with several ends, of which a model chooses the likeliest.

The score is the log-probability of the end's tokens given the beginning, summed: what lm-evaluation-harness calls acc.
Both models run as in `verify`, one decoder layer in memory at a time. The questions are rules/tables/choices.toml.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.records import TaskScore
from doctor.core.tables import table
from doctor.evaluate.compare import scored, streamed_pair, walk
from doctor.evaluate.scores import RESAMPLES

NAME = "choices"


class Row(NamedTuple):
    """One end of one question. begin: the position of its first token."""

    question: int
    end: int
    ids: list[int]
    begin: int


def rows_of_questions(encode: Callable[[str], list[int]]) -> list[Row]:
    """A row for each end of each question, by a tokenizer. The end begins where its text parts from the beginning's
    own tokens, since a tokenizer may join a blank to either side.
    """
    found = []
    for number, (begin, *ends) in enumerate(table(NAME)["questions"]):
        head = encode(begin)
        for which, end in enumerate(ends):
            ids = encode(f"{begin} {end}")
            same = 0
            while same < min(len(head), len(ids) - 1) and head[same] == ids[same]:
                same += 1
            found.append(Row(number, which, ids, max(same, 1)))
    return found


def choose(
    original: Checkpoint,
    quantized: Checkpoint,
    tokenizer: Any,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> TaskScore:
    """How often each model chooses the right end. Raises NotQuantizable where they are not one model."""
    rows = rows_of_questions(lambda text: tokenizer(text)["input_ids"])
    ids = [torch.tensor([row.ids]) for row in rows]
    a, b = streamed_pair(original, quantized, ids, device)
    walk((a, b), partial(progress, "tasks"))
    likely: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    for row, _last, (follows, *logits) in scored(ids, a, b):
        begin = rows[row].begin - 1  # position p's logits are of token p + 1
        for which, values in zip(likely, logits, strict=True):
            taken = torch.log_softmax(values, 1).gather(1, follows[:, None].to(values.device))[begin:, 0]
            which.setdefault(rows[row].question, []).append(float(taken.double().sum()))
    return score([likely[0][q] for q in likely[0]], [likely[1][q] for q in likely[1]])


def score(original: Sequence[Sequence[float]], quantized: Sequence[Sequence[float]]) -> TaskScore:
    """From the log-probabilities of the ends of each question, the right one first. NaN never is the choice."""
    first, second = ([_choice(question) for question in model] for model in (original, quantized))
    right = [(x == 0, y == 0) for x, y in zip(first, second, strict=True)]
    n, draw = len(right), random.Random(0)
    apart = sorted(sum(y - x for x, y in draw.choices(right, k=n)) / n for _again in range(RESAMPLES))
    cut = round(0.025 * RESAMPLES)
    before, after = (sum(model) / n for model in zip(*right, strict=True))
    return TaskScore(
        NAME,
        "acc",
        before,
        after,
        questions=n,
        original_error=_error(before, n),
        quantized_error=_error(after, n),
        span=(apart[cut], apart[-1 - cut]),
        same=sum(x == y and x is not None for x, y in zip(first, second, strict=True)) / n,
    )


def _choice(question: Sequence[float]) -> int | None:
    """The likeliest end; None where a log-probability is not finite."""
    if not all(map(math.isfinite, question)):
        return None
    return max(range(len(question)), key=lambda i: question[i])


def _error(share: float, n: int) -> float:
    """Standard error of a share of n questions."""
    return math.sqrt(share * (1 - share) / n)
