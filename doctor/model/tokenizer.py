"""tokenizer.json read as data: its vocabulary, its special tokens, and what its post-processor adds to a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from doctor.core.facts import Unavailable
from doctor.core.messages import _


@dataclass
class Tokenizer:
    """tokenizer.json as data, without the library that runs it. ids: of every token; added: of the added tokens
    alone.
    """

    ids: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    bos_added: str | None = None  # the token its post-processor puts in front of a single text
    kind: str = ""

    def token(self, token_id: int) -> str | None:
        """The token with this id, None if there is none."""
        return next((t for t, i in self.ids.items() if i == token_id), None)

    @property
    def largest_id(self) -> int:
        return max(self.ids.values(), default=-1)


def read_tokenizer(document: Mapping[str, Any]) -> Tokenizer:
    """Vocabulary and post-processor of a parsed tokenizer.json. Raises Unavailable if its form is unknown."""
    model = document.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
        ids = {t[0]: i for i, t in enumerate(vocabulary) if isinstance(t, list) and t and isinstance(t[0], str)}
    elif isinstance(vocabulary, dict):
        ids = {k: v for k, v in vocabulary.items() if isinstance(v, int)}
    else:
        raise Unavailable(_("tokenizer.json has no vocabulary"))
    added: dict[str, int] = {}
    special: set[str] = set()
    listed = document.get("added_tokens")
    for token in listed if isinstance(listed, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int):
            added[token["content"]] = token["id"]
            if token.get("special"):
                special.add(token["content"])
    return Tokenizer(
        {**ids, **added},
        added,
        frozenset(special),
        _first_added(document.get("post_processor")),
        str(model.get("type", "")),
    )


def _first_added(processor: object) -> str | None:
    """The special token that a post-processor puts before a single text, None for none."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        parts = processor.get("processors")
        return next(filter(None, map(_first_added, parts if isinstance(parts, list) else [])), None)
    single = processor.get("single")
    if (
        processor.get("type") == "TemplateProcessing"
        and isinstance(single, list)
        and single
        and isinstance(single[0], dict)
    ):
        token = single[0].get("SpecialToken")
        return _text(token.get("id")) if isinstance(token, dict) else None
    if processor.get("type") in ("BertProcessing", "RobertaProcessing") and isinstance(processor.get("cls"), list):
        return _text(next(iter(processor["cls"]), None))
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
