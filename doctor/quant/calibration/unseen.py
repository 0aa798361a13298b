"""Rows that no calibration row holds: of the same text, between or behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from doctor.checkpoint.directory import Checkpoint
from doctor.quant.calibration.documents import MIN_ROW, Documents, builtin_documents, local_file, read_documents
from doctor.quant.calibration.rows import stream_of
from doctor.quant.calibration.tokenizer import load_tokenizer

RUN = 32  # tokens that stand in a calibration row in the same order are text that calibrated
SEEN_SHARE = 0.5  # a row with so much of it tells nothing about text that did not


def unseen_rows(
    checkpoint: Checkpoint,
    source: str | os.PathLike | None,
    packed: int,
    *,
    count: int,
    length: int,
    seed: int = 0,
    known: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """At most `count` rows of at most `length` token ids at equal distances: of text, from the gaps that
    calibration_rows left in `source`; of ready rows of ids, from those that it left out. [] where there are none:
    conversations with images, or a source that is used up.

    packed: rows that calibration_rows cut from the same source with this length and seed. known: its rows; what
    repeats half of its tokens from them is left out.
    """
    documents = builtin_documents() if source is None else read_documents(local_file(source))
    if documents.ids:
        found = [row[:length] for row in documents.ids if len(row) >= MIN_ROW]
    elif packed:
        found = _between(documents, checkpoint, packed, length, seed)
    else:
        return []
    new = _new(found, known)
    return [new[(2 * i + 1) * len(new) // (2 * count)] for i in range(count)] if len(new) > count else new


def _between(documents: Documents, checkpoint: Checkpoint, packed: int, length: int, seed: int) -> list[list[int]]:
    """A row from each gap between the packed rows."""
    tokenizer = load_tokenizer(checkpoint, documents.name)
    first, stream = stream_of(documents, tokenizer, seed)
    body = length - len(first)
    step = len(stream) // packed
    room = min(step - body, body)
    if room < max(MIN_ROW, body // 2):
        return []
    return [first + stream[at : at + room] for at in (row * step + body for row in range(packed))]


def _new(rows: Iterable[list[int]], known: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows that do not repeat SEEN_SHARE of their tokens from the known ones."""
    runs = {tuple(row[at : at + RUN]) for row in known for at in range(0, len(row), RUN)}

    def repeated(row: list[int]) -> int:
        """Tokens of it that stand in a run of a known row, whose last run may be shorter."""
        at = total = 0
        while at < len(row):
            hit = tuple(row[at : at + RUN]) in runs
            total += min(RUN, len(row) - at) if hit else 0
            at += RUN if hit else 1
        return total

    return [row for row in rows if repeated(row) < SEEN_SHARE * len(row)]
