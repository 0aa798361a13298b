"""Rows of tokens on which quantizers are compared: calibration and held-out text, the same for every tool.

Text that every Python brings along, so nothing is downloaded and anyone gets the same rows from the same
Python version: the language reference in pydoc_data.topics, and the docstrings of the standard library. A
paragraph that occurs more than once (topics quote each other at length) is kept where it stands first. The
first half of the topics, then the docstrings, are for calibration; the second half of the topics is held out.
So no paragraph is in both.

Rows are spread evenly over their text and never overlap. A row starts with BOS where the model's tokenizer starts
with it, as every text that an engine gives the model will, and with no other special token.
"""

import ast
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

ROW_LENGTH = 512  # tokens; long enough for attention to matter, short enough that a laptop evaluates 24 rows


def calibration_rows(tokenizer, n_rows: int, length: int = ROW_LENGTH) -> list[list[int]]:
    """`n_rows` rows of `length` token ids to calibrate on. ValueError when the text is too short for that."""
    return spread("\n\n".join(split_text()[0]), tokenizer, n_rows, length)


def heldout_rows(tokenizer, n_rows: int, length: int = ROW_LENGTH) -> list[list[int]]:
    """`n_rows` rows of `length` token ids to judge on; shares no paragraph with calibration_rows."""
    return spread("\n\n".join(split_text()[1]), tokenizer, n_rows, length)


def spread(text: str, tokenizer, n_rows: int, length: int) -> list[list[int]]:
    """Rows at equal distances over the tokens of `text`; the first row starts at its token 0."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [tokenizer.bos_token_id] if starts_with_bos(tokenizer) else []
    body = length - len(first)
    if n_rows * body > len(ids):
        raise ValueError(
            f"{n_rows} rows of {length} tokens: the text has {len(ids):,} tokens; at most {len(ids) // body} such rows."
        )
    step = len(ids) // n_rows
    return [first + ids[row * step : row * step + body] for row in range(n_rows)]


def starts_with_bos(tokenizer) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


@cache
def split_text() -> tuple[list[str], list[str]]:
    """(calibration paragraphs, held-out paragraphs), all different."""
    reference = unique(paragraphs(topics[name] for name in sorted(topics)), seen=set())
    half = len(reference) // 2
    docstrings = unique(paragraphs(stdlib_docstrings()), seen={normal(p) for p in reference})
    return reference[:half] + docstrings, reference[half:]


def paragraphs(texts):
    return (paragraph for text in texts for paragraph in text.split("\n\n"))


def unique(items, seen: set[str]) -> list[str]:
    """The items that are new up to white space, in order; blank ones are left out. `seen` grows."""
    kept = []
    for item in items:
        key = normal(item)
        if key and key not in seen:
            seen.add(key)
            kept.append(item)
    return kept


def normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def stdlib_docstrings():
    """Docstrings of the top-level modules of the standard library, by file name; none is imported."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""
