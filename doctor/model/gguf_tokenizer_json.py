"""tokenizer.json and tokenizer_config.json of what a GGUF file says of its tokenizer: gguf_tokenizer.py, backwards.

Byte-level BPE is cut by the expressions that llama.cpp has for the name in tokenizer.ggml.pre. SentencePiece's has
scores and no merges: llama.cpp joins the pair whose result scores highest, so every way to make a token of two others
is a merge, in the order of the scores. Tokens that the user defined are found in the text before it is cut, such as
Gemma's runs of spaces.

Source: ggml-org/llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe, llm_tokenizer_spm, impl::load).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _, listed
from doctor.core.tables import table
from doctor.model.gguf_tokenizer import BYTE, CONTROL, UNUSED, USER_DEFINED

SPACE = "\u2581"  # what SentencePiece writes for a space
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_documents(metadata: Mapping[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """The JSON documents of a tokenizer, by name. file: for messages. Raises BadCheckpoint where it is of a kind, or
    cuts text in a way, that is not read here.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or kind not in ("gpt2", "llama"):
        raise BadCheckpoint(
            _(
                "{file}: its tokenizer {kind} is not read here; {known} are.",
                file=file,
                kind=repr(kind),
                known="gpt2, llama",
            )
        )
    made = _byte_level(metadata, tokens, file) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    special = _special(metadata, tokens)
    begins = _begins(metadata, kind)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": text for role, text in special.items()},
    }
    if isinstance(metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if begins and "bos" in special:
        made["post_processor"] = _template(special["bos"], bos)
    return {"tokenizer.json": made, "tokenizer_config.json": config}


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """bos_token_id and the like of config.json."""
    found = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items() if role != "unk"}
    return {f"{role}_token_id": number for role, number in found.items() if isinstance(number, int)}


def _special(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str]:
    found = {role: metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
    return {role: tokens[n] for role, n in found.items() if isinstance(n, int) and 0 <= n < len(tokens)}


def _begins(metadata: Mapping[str, Any], kind: str) -> bool:
    """Whether the BOS token goes before every text."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(stated, bool):
        return stated
    return kind == "llama" or bool(_split_of(metadata).get("bos"))


def _split_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the text is cut; {} for a name that is not in the table."""
    name = metadata.get("tokenizer.ggml.pre")
    known = table("gguf")["splits"]
    return next((entry for own, entry in known.items() if name == own or name in entry.get("names", ())), {})


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], file: str) -> dict[str, Any]:
    split, merges = _split_of(metadata), metadata.get("tokenizer.ggml.merges")
    if not split or not isinstance(merges, list):
        raise BadCheckpoint(
            _(
                "{file}: its pre-tokenizer {name} is not read here; {known} are.",
                file=file,
                name=repr(metadata.get("tokenizer.ggml.pre")),
                known=listed(sorted(table("gguf")["splits"])),
            )
        )
    vocab = _vocabulary(metadata, tokens)
    pairs = [merge.split(" ", 1) for merge in merges]
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in split["patterns"]
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        **_document(metadata, tokens),
        "normalizer": {"type": split["normalizer"]} if "normalizer" in split else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(split.get("ignore_merges")),
            "vocab": vocab,
            # One that makes no token is of no use to llama.cpp, and an error in a tokenizer.json.
            "merges": [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()],
        },
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    vocab = _vocabulary(metadata, tokens)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        **_document(metadata, tokens),
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(tokens, vocab, _scores(metadata, tokens), metadata),
        },
    }


def _vocabulary(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
    """Without the names that a converter gives to rows of the embedding that have no token."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    return {
        text: number
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if not (kind == UNUSED and text == f"[PAD{number}]")
    }


def _scores(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Sequence[float]:
    stated = metadata.get("tokenizer.ggml.scores")
    return (
        stated if isinstance(stated, list) and len(stated) == len(tokens) else [-float(i) for i in range(len(tokens))]
    )


def _merges(
    tokens: Sequence[str], vocab: Mapping[str, int], scores: Sequence[float], metadata: Mapping[str, Any]
) -> list[list[str]]:
    """Every pair of tokens that makes a third, the highest score first; those of one score in the order of the
    vocabulary.
    """
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    whole = {n for n, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED, BYTE)}
    part = {text: number for text, number in vocab.items() if number not in whole}.get
    found: list[tuple[float, int, int, int]] = []
    for text, number in vocab.items():
        if number in whole:
            continue
        for at in range(1, len(text)):
            left = part(text[:at])
            right = part(text[at:]) if left is not None else None
            if left is not None and right is not None:
                found.append((-scores[number], number, left, right))
    return [[tokens[left], tokens[right]] for _score, _number, left, right in sorted(found)]


def _document(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """What both kinds have: the tokens that are never cut."""
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    added = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (CONTROL, USER_DEFINED)
    ]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}


def _template(text: str, number: Any) -> dict[str, Any]:
    """The post-processor that puts one token before every text."""
    first, own = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, own],
        "pair": [first, own, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


def as_text(document: Mapping[str, Any]) -> bytes:
    """The bytes of a document's file."""
    return (json.dumps(document, ensure_ascii=False) + "\n").encode()  # indented, a large one takes ten times as long
