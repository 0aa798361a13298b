"""Calibration documents: a .txt, .jsonl or .parquet file, a dataset on the Hub, or text that Python brings along.

The built-in text is the language reference (pydoc_data.topics) and the docstrings of the standard library. The second
half of the reference is left out on purpose: perplexity is measured on it.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from doctor.core.errors import DoctorError
from doctor.core.messages import _

BUILTIN = _("Python's documentation")
_SUFFIXES = (".jsonl", ".parquet", ".txt")
MIN_ROW = 2  # a row of one token has no context at all


class Documents:
    """What a source holds before it is cut: texts or conversations to tokenize, or ready rows of ids."""

    def __init__(self, name: str, builtin: bool = False):
        self.name = name
        self.builtin = builtin
        self.folder = Path()  # where paths of images begin
        self.texts: list[str] = []
        self.messages: list[list] = []
        self.ids: list[list[int]] = []


def local_file(source: str | os.PathLike) -> Path:
    """The file of a source: itself, or one file of the dataset org/name, downloaded: its training part, JSON Lines
    before Parquet.
    """
    if not _is_dataset(source):
        return Path(source)
    text = os.fspath(source).removeprefix("hf://datasets/")
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


def require_text_of(source: str | os.PathLike | None) -> None:
    """require_text of a source that is a file, and neither the built-in text (None) nor a dataset on the Hub."""
    if source is not None and not _is_dataset(source):
        require_text(Path(source))


def _is_dataset(source: str | os.PathLike) -> bool:
    """Whether a source is the name of a dataset: org/name, where there is no such file."""
    path, text = Path(source), os.fspath(source).removeprefix("hf://datasets/")
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
    return named and not path.exists() and path.suffix.lower() not in _SUFFIXES


def require_text(path: Path) -> None:
    """Raises DoctorError for what cannot be read as calibration text, by its name and kind; opens nothing."""
    if path.suffix.lower() not in _SUFFIXES:
        raise DoctorError(
            _(
                "{path}: calibration text with the suffix {suffix!r}; must be .txt, .jsonl or .parquet.",
                path=str(path),
                suffix=path.suffix,
            )
        )
    if not path.exists():
        raise DoctorError(_("{path}: {why}.", path=str(path), why=os.strerror(errno.ENOENT)))
    if not path.is_file():
        raise DoctorError(_("{path}: not a regular file.", path=str(path)), _("Give a regular file."))


def read_documents(path: Path) -> Documents:
    """Documents of a .txt (one document), .jsonl (an object a line) or .parquet file (a column text, messages or
    input_ids).
    """
    require_text(path)
    documents = Documents(path.name)
    documents.folder = path.parent
    reader = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix.lower()]
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
        _take(
            {k: v for k, v in row.items() if v is not None},
            _("{path}: row {row}", path=str(path), row=number),
            documents,
        )


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

    Paragraphs of the second half of the reference are in neither, even where docstrings repeat them.
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
