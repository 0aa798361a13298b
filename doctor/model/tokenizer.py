"""tokenizer.json read as data: its vocabulary, its special tokens, and what its post-processor adds to a text."""

from dataclasses import dataclass, field

from doctor.core.facts import Unavailable


@dataclass
class Tokenizer:
    """What tokenizer.json says, without the library that runs it. ids: every token's id; added: those added on top."""

    ids: dict[str, int]
    added: dict[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    bos_added: str | None = None  # the token its post-processor puts in front of a single text
    kind: str = ""

    def token(self, token_id: int) -> str | None:
        """The text of an id, None where no token has it."""
        return next((t for t, i in self.ids.items() if i == token_id), None)

    @property
    def largest_id(self) -> int:
        return max(self.ids.values(), default=-1)


def read_tokenizer(document: dict) -> Tokenizer:
    """Vocabulary and post-processor of a parsed tokenizer.json. Raises Unavailable where its form is unknown."""
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
        ids = {t[0]: i for i, t in enumerate(vocabulary) if isinstance(t, list) and t and isinstance(t[0], str)}
    elif isinstance(vocabulary, dict):
        ids = {k: v for k, v in vocabulary.items() if isinstance(v, int)}
    else:
        raise Unavailable("tokenizer.json has no vocabulary")
    added, special = {}, set()
    for token in document.get("added_tokens") or []:
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
    """The special token that a TemplateProcessing post-processor puts before a single text, None for none."""
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
        return token.get("id") if isinstance(token, dict) else None
    if processor.get("type") in ("BertProcessing", "RobertaProcessing") and isinstance(processor.get("cls"), list):
        return processor["cls"][0]
    return None
