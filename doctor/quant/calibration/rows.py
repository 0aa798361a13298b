"""CalibrationFacts rows: text or ids in, rows of token ids out, packed end to end without padding, and the facts
about them.

Documents are joined by the end-of-sequence token and cut into rows of one length; a row starts with BOS once where the
model's own tokenizer starts with it. Rows are spread evenly over the text, so the same input gives the same rows on any
machine, but for text sampled from the model. Padding would enter the Hessian as if it were text, so there is none.

The default is text that Python brings along, the language reference (pydoc_data.topics) and the docstrings of the
standard library, and for up to a quarter of the rows text that the model itself writes, where that is cheap
(sample.py). The second half of the reference is left out of it on purpose: it is what perplexity is measured on.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.messages import _
from doctor.core.records import CalibrationFacts
from doctor.quant.calibration import text_scripts

ROWS, MAX_SEQ_LENGTH = 128, 512
BUILTIN = _("Python's documentation")
SAMPLED_SHARE = 4  # at most one row in so many is written by the model itself, where no text is given
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)
_SUFFIXES = (".jsonl", ".parquet", ".txt")
_MIN_ROW = 2  # a row of one token has no context at all


class NotSampled(Exception):
    """Why the model writes no text to calibrate on; its text is a reason for people."""


class Documents:
    """What a source holds before it is cut: texts or conversations to tokenize, or ready rows of ids."""

    def __init__(self, name: str, builtin: bool = False):
        self.name = name
        self.builtin = builtin
        self.texts: list[str] = []
        self.messages: list[list] = []
        self.ids: list[list[int]] = []


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
    if rows < 1 or length < _MIN_ROW:
        raise DoctorError(
            _(
                "calibration: {rows} rows of {length} tokens; must be 1 or more rows of {least} or more tokens.",
                rows=rows,
                length=length,
                least=_MIN_ROW,
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
    documents = builtin_documents() if source is None else read_documents(_local(source))
    needs_tokenizer = bool(documents.texts or documents.messages)
    tokenizer = load_tokenizer(checkpoint, documents.name) if needs_tokenizer else None
    ready = [list(r[:length]) for r in documents.ids if len(r) >= _MIN_ROW]
    own, reason = _sampled(sample, tokenizer, rows, length) if documents.builtin and sample else ([], "")
    if reason:
        notes.append(_("no text is sampled from the model: {reason}", reason=reason))
    packed = (
        rows_of(documents, tokenizer, rows - min(len(ready), rows) - len(own), length, seed) if needs_tokenizer else []
    )
    short = len(documents.ids) - len(ready)
    if short:
        notes.append(_("{rows} rows of fewer than {least} tokens are left out", rows=short, least=_MIN_ROW))
    found = ready[:rows] + packed + own
    if not found:
        raise DoctorError(
            _("{name}: not one row of {least} or more tokens.", name=documents.name, least=_MIN_ROW),
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
    facts = replace(describe(found, documents, tokenizer), sampled_rows=len(own), not_sampled=reason)
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
        duplicate_rows=len(rows) - len({tuple(r) for r in rows}),
        bos_doubled=0 if bos is None else sum(r[:2] == [bos, bos] for r in rows),
        padding=0 if pad is None or shares_pad else sum(r.count(pad) for r in rows),
    )


# sources


def _local(source: str | os.PathLike) -> Path:
    """The file of a source: itself, or one file of the dataset org/name, downloaded: its training part, JSON Lines
    before Parquet.
    """
    path = Path(source)
    text = os.fspath(source).removeprefix("hf://datasets/")
    if path.exists() or path.suffix.lower() in _SUFFIXES or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return path
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(text, repo_type="dataset")
        fit = [f for f in files if Path(f).suffix.lower() in _SUFFIXES]
        if not fit:
            raise DoctorError(
                _(
                    "{dataset}: none of its {files} files ends with {suffixes}.",
                    dataset=text,
                    files=len(files),
                    suffixes=", ".join(_SUFFIXES),
                ),
                _("Convert a part of it to .jsonl."),
            )
        best = min(fit, key=lambda f: ("train" not in f, _SUFFIXES.index(Path(f).suffix.lower()), f))
        return Path(huggingface_hub.hf_hub_download(text, best, repo_type="dataset"))
    except (OSError, ValueError) as error:  # what the Hub's client raises for no network and no such dataset
        raise DoctorError(
            _(
                "{name}: neither a file nor a dataset on the Hub: {why}",
                name=text,
                why=str(error).splitlines()[0][:160],
            ),
            _("Give a .txt, .jsonl or .parquet file, or org/name of a dataset."),
        ) from None


def read_documents(path: Path) -> Documents:
    """Documents of a .txt (one document), .jsonl (an object a line) or .parquet file (a column text, messages or
    input_ids).
    """
    documents = Documents(path.name)
    reader = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise DoctorError(
            _(
                "{path}: calibration text with the suffix {suffix!r}; must be .txt, .jsonl or .parquet.",
                path=str(path),
                suffix=path.suffix,
            )
        )
    try:
        reader(path, documents)
    except OSError as error:
        raise DoctorError(_("{path}: {why}.", path=str(path), why=error.strerror)) from None
    except UnicodeDecodeError as error:
        raise DoctorError(
            _("{path}: not UTF-8 at byte {start:,}; calibration text must be UTF-8.", path=path, start=error.start)
        ) from None
    return documents


def _read_text(path: Path, documents: Documents) -> None:
    documents.texts.append(path.read_text(encoding="utf-8"))


def _read_jsonl(path: Path, documents: Documents) -> None:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DoctorError(
                    _(
                        "{path}:{line}: not JSON: {why}; every line must be one object.",
                        path=str(path),
                        line=number,
                        why=error.msg,
                    )
                ) from None
            _take(row, f"{path}:{number}", documents)


def _read_parquet(path: Path, documents: Documents) -> None:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DoctorError(
            _("{path}: reading .parquet needs pyarrow, which is not installed.", path=path),
            _("pip install pyarrow, or convert the file to .jsonl."),
        ) from None
    for number, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
        _take({k: v for k, v in row.items() if v is not None}, f"{path}: row {number}", documents)


def _take(row: object, where: str, documents: Documents) -> None:
    if (
        isinstance(row, dict)
        and isinstance(row.get("input_ids"), list)
        and all(type(t) is int and t >= 0 for t in row["input_ids"])
    ):
        documents.ids.append(row["input_ids"])
    elif isinstance(row, dict) and isinstance(row.get("messages"), list):
        documents.messages.append(row["messages"])
    elif isinstance(row, dict) and isinstance(row.get("text"), str):
        documents.texts.append(row["text"])
    else:
        if isinstance(row, dict) and "input_ids" in row:
            raise DoctorError(_("{where}: input_ids must be a list of whole numbers, 0 or more.", where=where))
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DoctorError(
            _(
                '{where}: has {keys}; must have "text", "messages" or "input_ids".',
                where=where,
                keys=keys or _("nothing"),
            )
        )


@cache
def builtin_paragraphs() -> tuple[str, ...]:
    """Paragraphs of the built-in text, all different: the first half of the language reference, then docstrings.

    Paragraphs of the second half of the reference are in neither, wherever else they stand.
    """
    from pydoc_data.topics import topics

    reference = _unique((topics[name] for name in sorted(topics)), set())
    docstrings = _unique(_docstrings(), {_normal(p) for p in reference})
    return (*reference[: len(reference) // 2], *docstrings)


def builtin_documents() -> Documents:
    documents = Documents(BUILTIN, builtin=True)
    documents.texts.append("\n\n".join(builtin_paragraphs()))
    return documents


def heldout_documents() -> Documents:
    """The second half of the language reference: what no built-in calibration row holds, for measuring perplexity."""
    from pydoc_data.topics import topics

    reference = _unique((topics[name] for name in sorted(topics)), set())
    documents = Documents(_("held-out half of {text}", text=BUILTIN), builtin=True)
    documents.texts.append("\n\n".join(reference[len(reference) // 2 :]))
    return documents


def _docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def _unique(texts: Iterable[str], seen: set[str]) -> list[str]:
    kept = []
    for paragraph in (p for text in texts for p in text.split("\n\n")):
        key = _normal(paragraph)
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return kept


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


# tokens


def load_tokenizer(checkpoint: Checkpoint, wanted_by: str):
    """The checkpoint's tokenizer through transformers, with edits of a view applied. Its own code is never run.

    Raises BadCheckpoint where there is none: ready ids ({"input_ids": [...]} lines) need no tokenizer.
    """
    from transformers import AutoTokenizer

    with _tokenizer_directory(checkpoint) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            raise BadCheckpoint(
                _(
                    "{root}: the tokenizer cannot be loaded for {text}: {why}.",
                    root=str(checkpoint.root),
                    text=wanted_by,
                    why=str(error).splitlines()[0][:200],
                ),
                _(
                    "Add the tokenizer's files, or calibrate on a .jsonl of {example} lines.",
                    example='{"input_ids": [...]}',
                ),
            ) from None


@contextmanager
def _tokenizer_directory(checkpoint: Checkpoint) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="doctor-tokenizer-") as folder:
        for name in TOKENIZER_FILES:
            if name in checkpoint.json:
                (Path(folder) / name).write_bytes(checkpoint.json[name].raw)
            elif name in checkpoint.entries:
                (Path(folder) / name).write_bytes(checkpoint.read_file(name))
        yield Path(folder)


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


def starts_with_bos(tokenizer) -> bool:
    """Whether this tokenizer puts BOS in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def pack(documents: list[list[int]], rows: int, length: int, tokenizer) -> list[list[int]]:
    """At most `rows` rows of `length` ids, at equal distances over the documents joined by EOS; one short row if that
    is all.
    """
    first = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream = [token for number, ids in enumerate(documents) for token in ((end if number else []) + ids)]
    body = length - len(first)
    count = min(rows, len(stream) // body)
    if rows and not count and len(stream) >= _MIN_ROW:
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
