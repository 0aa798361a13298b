"""Rows that lie between the calibration rows: the same text, no token of which calibrated anything."""

from __future__ import annotations

import os

from doctor.checkpoint.directory import Checkpoint
from doctor.quant.calibration.documents import MIN_ROW, builtin_documents, local_file, read_documents
from doctor.quant.calibration.rows import stream_of
from doctor.quant.calibration.tokenizer import load_tokenizer


def unseen_rows(
    checkpoint: Checkpoint,
    source: str | os.PathLike | None,
    packed: int,
    *,
    count: int,
    length: int,
    seed: int = 0,
) -> list[list[int]]:
    """At most `count` rows of at most `length` token ids from the gaps that calibration_rows left in `source`, at equal
    distances; [] where it left none: rows of ids, conversations with images, or text that is used up.

    packed: rows that calibration_rows cut from the same source with this length and seed.
    """
    documents = builtin_documents() if source is None else read_documents(local_file(source))
    if documents.ids or not packed:
        return []
    tokenizer = load_tokenizer(checkpoint, documents.name)
    first, stream = stream_of(documents, tokenizer, seed)
    body = length - len(first)
    step = len(stream) // packed
    room = min(step - body, body)
    if room < max(MIN_ROW, body // 2):
        return []
    chosen = sorted({(2 * i + 1) * packed // (2 * count) for i in range(count)})
    return [first + stream[at : at + room] for at in (row * step + body for row in chosen)]
