"""The checkpoint's tokenizer through transformers, with edits of a view applied; its own code is never run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.quant.calibration.tokenizer_probe import why_unusable

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


def load_tokenizer(checkpoint: Checkpoint, wanted_by: str):
    """The checkpoint's tokenizer through transformers, with edits of a view applied. Its own code is never run, and it
    is used in a process with limits first (tokenizer_probe.py).

    Raises BadCheckpoint where there is none: ready ids ({"input_ids": [...]} lines) need no tokenizer.
    """
    from transformers import AutoTokenizer

    with tokenizer_directory(checkpoint) as folder:
        try:
            if os.environ.get("DOCTOR_LOAD_PROOF") != "0" and (why := why_unusable(folder)):
                raise ValueError(why)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # tokenizers raises a plain Exception for a file that it cannot read
            raise BadCheckpoint(
                _(
                    "{root}: the tokenizer cannot be loaded for {text}: {why}.",
                    root=str(checkpoint.root),
                    text=wanted_by,
                    why=(str(error).splitlines() or [type(error).__name__])[0][:200],
                ),
                _(
                    "Add the tokenizer's files, or calibrate on a .jsonl of {example} lines.",
                    example='{"input_ids": [...]}',
                ),
            ) from None


@contextmanager
def directory_of(checkpoint: Checkpoint, names: Iterable[str], prefix: str) -> Iterator[Path]:
    """A temporary directory of these files alone, those that are there, with edits of a view applied."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        for name in names:
            if name in checkpoint.json:
                (Path(folder) / name).write_bytes(checkpoint.json[name].raw)
            elif name in checkpoint.entries:
                (Path(folder) / name).write_bytes(checkpoint.read_file(name))
        yield Path(folder)


def tokenizer_directory(checkpoint: Checkpoint) -> AbstractContextManager[Path]:
    """A temporary directory of the tokenizer's files alone."""
    return directory_of(checkpoint, TOKENIZER_FILES, "doctor-tokenizer-")


def starts_with_bos(tokenizer) -> bool:
    """Whether this tokenizer starts a text with BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def encoder(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """A text's tokens, special ones too, as the checkpoint's tokenizer gives them; it is loaded once it is asked."""
    loaded: list = []

    def encode(text: str) -> list[int]:
        if not loaded:
            loaded.append(load_tokenizer(checkpoint, _("its metadata")))
        return list(loaded[0].encode(text))

    return encode
