"""tokenizer.json as GGUF's metadata: tokens, their types, merges or scores, special ids, and which pre-tokenizer.

Two kinds are written. Byte-level BPE ("gpt2") needs the name of the pre-tokenizer that llama.cpp has for it: the
SHA-256 of how the tokenizer cuts one fixed text names it, by the rule and table of llama.cpp's converter. BPE that
falls back to bytes ("llama", what SentencePiece makes) needs a score for each token: llama.cpp joins the pair whose
result scores highest, so a token scores minus the rank of the first merge that makes it.

Source: ggml-org/llama.cpp conversion/base.py (get_vocab_base_pre, _set_vocab_gpt2, _create_vocab_sentencepiece),
gguf-py/gguf/vocab.py (SpecialVocab), src/llama-vocab.cpp (llm_tokenizer_spm).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from doctor.checkpoint import gguf_writer as w
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.gguf_writer import Value
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _
from doctor.core.tables import table

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# The text whose tokens name a pre-tokenizer, as llama.cpp's converter has it: a fact of that program, letter for
# letter.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (m"
    "ultiple emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3"
    " 3..3 3...3 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785"
    "\U0001f601 ?\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449"
    "\u043e \u043d\u0430 \u0411\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!"
    "!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'"
    "Ve a'lL"
)
Encode = Callable[[str], list[int]]  # a text's tokens, special ones too


def kind_of(document: Mapping[str, Any]) -> str:
    """What llama.cpp calls this tokenizer: "gpt2" or "llama". Raises NotQuantizable for other ones."""
    model = document.get("model") if isinstance(document.get("model"), Mapping) else {}
    assert isinstance(model, Mapping)
    kind = model.get("type", "BPE" if "merges" in model else "")
    if kind == "BPE" and model.get("byte_fallback"):
        return "llama"
    if kind == "BPE" and '"ByteLevel"' in str(document.get("pre_tokenizer")).replace("'", '"'):
        return "gpt2"
    raise NotQuantizable(
        _("tokenizer.json: a tokenizer of kind {kind} is not written as GGUF here.", kind=str(kind or "unknown")),
        _("Byte-level BPE and BPE with bytes to fall back on are."),
    )


def pre_tokenizer(encode: Encode) -> str:
    """tokenizer.ggml.pre of a byte-level tokenizer. Raises NotQuantizable for one that llama.cpp's table does not
    know.
    """
    digest = hashlib.sha256(str(encode(PROBE)).encode()).hexdigest()
    known = table("gguf")["pre_tokenizers"]
    if digest not in known:
        raise NotQuantizable(
            _(
                "tokenizer.json: cuts text as no pre-tokenizer of llama.cpp that is known here (hash {digest}).",
                digest=digest[:16],
            ),
            _("A wrong name would tokenize wrongly without an error; convert it with llama.cpp's own converter."),
        )
    return known[digest]


def tokenizer_metadata(checkpoint: Checkpoint, rows: int, encode: Encode) -> dict[str, Value]:
    """The tokenizer.* keys. rows: of the embedding; ids without a token get one that is marked unused."""
    document = checkpoint.value("tokenizer.json")
    if document is None:
        raise NotQuantizable(
            _("{root}: has no tokenizer.json, which GGUF takes its tokens from.", root=str(checkpoint.root)),
            _("Save the tokenizer in that form with transformers' save_pretrained."),
        )
    kind = kind_of(document)
    model, added = document["model"], _added(document)
    ids = {**model["vocab"], **{text: token["id"] for text, token in added.items()}}
    highest = max(ids.values(), default=-1)
    if highest >= rows:
        raise NotQuantizable(
            _(
                "tokenizer.json: has the token id {highest}, and the embedding has {rows} rows.",
                highest=highest,
                rows=rows,
            ),
            _("Run `doctor check`."),
        )
    names = [f"[PAD{i}]" for i in range(rows)]
    kinds = [UNUSED] * rows
    for text, number in ids.items():
        names[number] = text
        kinds[number] = _kind_of_token(text, added.get(text), model, kind)
    found: dict[str, Value] = {"tokenizer.ggml.model": w.text(kind)}
    if kind == "gpt2":
        found["tokenizer.ggml.pre"] = w.text(pre_tokenizer(encode))
    else:
        found["tokenizer.ggml.pre"] = w.text("default")
        found["tokenizer.ggml.scores"] = w.f32s(_scores(model, names))
        found["tokenizer.ggml.add_space_prefix"] = w.boolean(_prepends_space(document))
    found["tokenizer.ggml.tokens"] = w.texts(names)
    found["tokenizer.ggml.token_type"] = w.i32s(kinds)
    if kind == "gpt2":
        found["tokenizer.ggml.merges"] = w.texts([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    return found | _special(checkpoint, ids, encode)


def _added(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        t["content"]: t
        for t in document.get("added_tokens") or ()
        if isinstance(t, Mapping) and isinstance(t.get("content"), str) and isinstance(t.get("id"), int)
    }


def _kind_of_token(text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any], kind: str) -> int:
    if text == model.get("unk_token"):
        return UNKNOWN
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    if kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    return NORMAL


def _scores(model: Mapping[str, Any], names: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token; below all of them where none does."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = float(len(model["merges"]) + 1)
    return [-float(ranks.get(name, last)) for name in names]


def _prepends_space(document: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before the text."""
    return '"Prepend"' in str(document.get("normalizer")).replace("'", '"') or "'always'" in str(
        document.get("pre_tokenizer")
    )


def _special(checkpoint: Checkpoint, ids: Mapping[str, int], encode: Encode) -> dict[str, Value]:
    """Special ids, whether a BOS goes before every text, and the chat template."""
    stated, config = checkpoint.value("tokenizer_config.json") or {}, checkpoint.value("config.json") or {}
    found: dict[str, Value] = {}
    numbers: dict[str, int] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = stated.get(f"{role}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        number = ids.get(token) if isinstance(token, str) else config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number >= 0:
            numbers[role] = number
            found[f"tokenizer.ggml.{key}_token_id"] = w.u32(number)
    begins = encode("a")[:1]
    found["tokenizer.ggml.add_bos_token"] = w.boolean(bool(begins) and begins[0] == numbers.get("bos", -1))
    template = stated.get("chat_template")
    if not isinstance(template, str) and "chat_template.jinja" in checkpoint.entries:
        template = checkpoint.read_file("chat_template.jinja").decode("utf-8", "replace")
    if isinstance(template, str):
        found["tokenizer.chat_template"] = w.text(template)
    return found
