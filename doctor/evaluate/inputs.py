"""What verify and kvcache feed a model with: rows of held-out text, and prompts."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.model.spec import build_spec
from doctor.quant.calibration.documents import heldout_documents, read_documents
from doctor.quant.calibration.rows import rows_of
from doctor.quant.calibration.tokenizer import load_tokenizer

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
)
_LEARNED = re.compile(r"\b(?:wpe|embed_positions|position_embeddings?)\.weight$")
PROMPT_TOKENS = 16  # of a held-out row, where there is no tokenizer to make prompts with


def fitting(checkpoint: Checkpoint, context: int) -> int:
    """Tokens of a row, at most `context`: as many as there are learned positions, behind which a lookup fails. Rotary
    positions have no end.
    """
    if not any(map(_LEARNED.search, checkpoint.tensors)):
        return context
    return min(context, build_spec(checkpoint.value("config.json") or {}, {}).max_positions or context)


def text_rows(
    checkpoint: Checkpoint, text: str | os.PathLike | None, rows: int, context: int
) -> tuple[list[torch.Tensor], Any, str]:
    """(rows int64[1, context], tokenizer or None, name of the source). Raises DoctorError where there is not one
    row.
    """
    documents = heldout_documents() if text is None else read_documents(Path(text))
    if documents.ids:
        ids, tokenizer = [list(r[:context]) for r in documents.ids[:rows] if len(r) > 1], None
    else:
        tokenizer = load_tokenizer(checkpoint, documents.name)
        ids = rows_of(documents, tokenizer, rows, context)
    if not ids:
        raise DoctorError(_("{source}: not one row of 2 or more tokens.", source=documents.name), _("Give more text."))
    return [torch.tensor([row]) for row in ids], tokenizer, documents.name


def prompts_of(tokenizer: Any, ids: list[torch.Tensor]) -> tuple[list[torch.Tensor], Callable[[list[int]], str]]:
    """(prompts int64[1, length], what gives the text of a reply); without a tokenizer the beginnings of rows."""
    if tokenizer is None:
        return [row[:, :PROMPT_TOKENS] for row in ids[:4]], lambda tokens: " ".join(map(str, tokens))
    encoded = [tokenizer(p, return_tensors="pt")["input_ids"] for p in PROMPTS]
    return [e for e in encoded if e.shape[1]], lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers warns on stderr about token ids and the like while it reads a config; the rules judge those."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
