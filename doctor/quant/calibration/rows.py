"""Calibration rows: documents in, rows of token ids out, packed end to end without padding, and the facts about them.

Documents are joined by the end-of-sequence token and cut into rows of one length. A row starts with BOS once where
the model's own tokenizer starts with it. Rows are spread evenly over the text, so the same input gives the same rows
on any machine, except for text sampled from the model. Padding would enter the Hessian as if it were text, so there
is none.

The default is text that Python brings along, and for up to a quarter of the rows text that the model itself writes,
where that is cheap (self_generated.py).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.records import CalibrationFacts
from doctor.quant.calibration import text_scripts
from doctor.quant.calibration.documents import (
    BUILTIN,
    MIN_ROW,
    Documents,
    builtin_documents,
    local_file,
    read_documents,
)
from doctor.quant.calibration.pictures import SeenRow, seen_rows, shows_more_than_text
from doctor.quant.calibration.tokenizer import load_tokenizer, starts_with_bos

ROWS, MAX_SEQ_LENGTH = 128, 512
SAMPLED_SHARE = 4  # at most one row in so many is written by the model itself, where no text is given


class NotSampled(Exception):
    """Why the model writes no text to calibrate on; its text is a reason for people."""


def calibration_rows(
    checkpoint: Checkpoint,
    source: str | os.PathLike | None,
    *,
    rows: int,
    length: int,
    seed: int = 0,
    vocab: int | None = None,
    max_positions: int | None = None,
    sample: Callable | None = None,
) -> tuple[list[list[int]], CalibrationFacts, list[str]]:
    """(rows of token ids, facts about them, notes): at most `rows` rows of at most `length` tokens.

    source: a .txt, .jsonl or .parquet file, org/name of a dataset on the Hub, or None for the built-in text. seed 0
    keeps the documents' order, others shuffle them. sample: sample.sampler's function; with it a part of the rows of
    the built-in text is written by the model. notes are sentences on what differs from what was asked (shorter rows,
    fewer rows). Raises DoctorError for a source that cannot be read or gives no row.
    """
    if rows < 1 or length < MIN_ROW:
        raise DoctorError(
            _(
                "calibration: {rows} rows of {length} tokens; must be 1 or more rows of {least} or more tokens.",
                rows=rows,
                length=length,
                least=MIN_ROW,
            )
        )
    notes: list[str] = []
    if max_positions and length > max_positions:
        notes.append(
            _(
                "rows have {positions} tokens instead of {length}: the model has no more positions",
                positions=max_positions,
                length=length,
            )
        )
        length = max_positions
    documents = builtin_documents() if source is None else read_documents(local_file(source))
    shown = [m for m in documents.messages if shows_more_than_text(m)]
    documents.messages = [m for m in documents.messages if not shows_more_than_text(m)]
    seen = seen_rows(checkpoint, shown, documents.folder, documents.name, rows) if shown else []
    needs_tokenizer = bool(documents.texts or documents.messages)
    tokenizer = load_tokenizer(checkpoint, documents.name) if needs_tokenizer else None
    ready = [*seen, *(list(r[:length]) for r in documents.ids if len(r) >= MIN_ROW)]
    own, reason = _sampled(sample, tokenizer, rows, length) if documents.builtin and sample else ([], "")
    if reason:
        notes.append(_("no text is sampled from the model: {reason}", reason=reason))
    packed = (
        rows_of(documents, tokenizer, rows - min(len(ready), rows) - len(own), length, seed) if needs_tokenizer else []
    )
    short = len(documents.ids) + len(seen) - len(ready)
    if short:
        notes.append(_("{rows} rows of fewer than {least} tokens are left out", rows=short, least=MIN_ROW))
    found = ready[:rows] + packed + own
    if not found:
        raise DoctorError(
            _("{name}: not one row of {least} or more tokens.", name=documents.name, least=MIN_ROW),
            _("Give more or longer text."),
        )
    if len(found) < rows:
        notes.append(
            _(
                "{found} rows instead of {rows}: {source} has no more text",
                found=len(found),
                rows=rows,
                source=documents.name,
            )
        )
    _require_in_vocabulary(found, vocab, documents.name)
    facts = replace(
        describe(found, documents, tokenizer),
        sampled_rows=len(own),
        not_sampled=reason,
        seen_rows=sum(isinstance(row, SeenRow) for row in found),
    )
    return (
        found,
        replace(facts, source=_("{text} and text sampled from the model", text=BUILTIN)) if own else facts,
        notes,
    )


def _sampled(sample: Callable, tokenizer, rows: int, length: int) -> tuple[list[list[int]], str]:
    """(whole rows that the model wrote, "") or ([], why there are none)."""
    wanted = rows // SAMPLED_SHARE
    if not wanted:
        return [], _("fewer than {n} rows", n=SAMPLED_SHARE)
    try:
        found = [r for r in pack(sample(tokenizer, wanted, length), wanted, length, tokenizer) if len(r) == length]
    except NotSampled as error:
        return [], error.args[0]
    return found, "" if found else _("it ended its texts at once")


def describe(rows: list[list[int]], documents: Documents, tokenizer) -> CalibrationFacts:
    """Facts of finished rows."""
    lengths = sorted(len(r) for r in rows)
    bos = getattr(tokenizer, "bos_token_id", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    shares_pad = pad in {
        None,
        bos,
        getattr(tokenizer, "eos_token_id", None),
        getattr(tokenizer, "unk_token_id", None),
    }
    scripts, unused = (
        text_scripts.of_rows(rows, tokenizer) if tokenizer is not None and not documents.builtin else ((), ())
    )
    return CalibrationFacts(
        scripts=scripts,
        unused_scripts=unused,
        source=documents.name,
        builtin=documents.builtin,
        rows=len(rows),
        tokens=sum(lengths),
        shortest=lengths[0],
        median=lengths[len(lengths) // 2],
        longest=lengths[-1],
        distinct_tokens=len({t for r in rows for t in r}),
        duplicate_rows=len(rows) - len({repr(r) if isinstance(r, SeenRow) else tuple(r) for r in rows}),
        bos_doubled=0 if bos is None else sum(r[:2] == [bos, bos] for r in rows),
        padding=0 if pad is None or shares_pad else sum(r.count(pad) for r in rows),
    )


def _tokenize(documents: Documents, tokenizer, seed: int) -> list[list[int]]:
    """Ids of every document, without special tokens in front: packing adds BOS once a row."""
    found = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents.texts]
    if documents.messages and not tokenizer.chat_template:
        raise DoctorError(
            _(
                '{name}: has "messages", and the tokenizer has no chat template to write them with.',
                name=documents.name,
            ),
            _('Give "text" instead.'),
        )
    for messages in documents.messages:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found.append(ids[1:] if ids[:1] == [tokenizer.bos_token_id] and starts_with_bos(tokenizer) else ids)
    if seed:
        random.Random(seed).shuffle(found)
    return found


def rows_of(documents: Documents, tokenizer, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """At most `rows` rows of ids of the documents' texts and conversations; see `pack`."""
    return pack(_tokenize(documents, tokenizer, seed), rows, length, tokenizer)


def stream_of(documents: Documents, tokenizer, seed: int = 0) -> tuple[list[int], list[int]]:
    """(what each row starts with, ids of all documents joined by EOS): what `pack` cuts rows from."""
    return _joined(_tokenize(documents, tokenizer, seed), tokenizer)


def _joined(documents: list[list[int]], tokenizer) -> tuple[list[int], list[int]]:
    first = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return first, [token for number, ids in enumerate(documents) for token in ((end if number else []) + ids)]


def pack(documents: list[list[int]], rows: int, length: int, tokenizer) -> list[list[int]]:
    """At most `rows` rows of `length` ids, at equal distances over the documents joined by EOS; one short row if that
    is all.
    """
    first, stream = _joined(documents, tokenizer)
    body = length - len(first)
    count = min(rows, len(stream) // body)
    if rows and not count and len(stream) >= MIN_ROW:
        return [first + stream]
    step = len(stream) // count if count else 0
    return [first + stream[row * step : row * step + body] for row in range(count)]


def _require_in_vocabulary(rows: list[list[int]], vocab: int | None, name: str) -> None:
    largest = max(max(r) for r in rows)
    if vocab is not None and largest >= vocab:
        row = next(i for i, r in enumerate(rows) if largest in r)
        raise DoctorError(
            _(
                "{name}: row {row} has token id {largest}; ids must be below vocab_size {vocab}.",
                name=name,
                row=row,
                largest=largest,
                vocab=vocab,
            ),
            _("Use ids of this model's own tokenizer."),
        )
