"""Special tokens: which file says what about BOS, EOS and PAD, in one list, and what is known of the model's family.

Every file may say it in its own way: an id, a list of ids, a token's text, an object with `content`, null, or nothing.
Id 0 is legal, so presence is never tested by truth.
"""

import re
from dataclasses import dataclass, field

from doctor.core.facts import fact, key_of
from doctor.core.tables import table

ROLES = ("bos", "eos", "pad")
# Marks that open or close a turn of a chat; a model's beginning-of-text token is not one of them unless its vendor says
# so.
TURN_MARKS = frozenset(
    {
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
    }
)


@dataclass(frozen=True)
class Statement:
    """What one file says of one role. `value` is as it stands in the file; `stated` is False where the key is
    absent.
    """

    file: str
    pointer: str
    role: str
    value: object = None
    stated: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids meant, () for null, absent and malformed values."""
        values = self.value if isinstance(self.value, list) else [self.value]
        return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


@dataclass
class Special:
    """All statements. names: role -> the token's text in tokenizer_config.json."""

    model_type: str
    statements: list[Statement] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def of(self, file: str, role: str) -> Statement:
        """The statement of config.json or generation_config.json on a role; one with stated False where there is
        none.
        """
        for s in self.statements:
            if s.file == file and s.role == role:
                return s
        return Statement(file, f"/{role}_token_id", role)

    @property
    def families(self) -> list[dict]:
        """Entries of the table of special tokens for this model_type; several vendors may share one."""
        return [
            e
            for e in table("special_tokens")["families"].values()
            if _covers(str(e.get("model_type", "")), self.model_type)
        ]

    @property
    def ships_bos(self) -> bool | None:
        """Whether vendors of this model_type state a BOS in config.json; None where nobody is known."""
        said = [e["config_ships_bos"] for e in self.families if "config_ships_bos" in e]
        return any(said) if said else None

    def class_default(self, role: str) -> object:
        """The id that transformers takes where config.json lacks the key."""
        return table("special_tokens")["class_defaults_transformers_5_23"].get(self.model_type, {}).get(role)


def _covers(names: str, model_type: str) -> bool:
    for name in re.split(r"[,/ ]+", re.sub(r"\(.*?\)", "", names)):
        if name and (name == model_type or (name.endswith("*") and model_type.startswith(name[:-1]))):
            return True
    return False


def token_text(value: object) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


@fact("checkpoint", cost="header")
def special(checkpoint, spec, generation_config=None, tokenizer_config=None) -> Special:
    """What each file says about BOS, EOS and PAD (special.Special)."""
    found = Special(spec.model_type)
    outer = checkpoint.value("config.json") or {}
    inner = spec.section(outer) if spec.text_key else {}
    for role in ROLES:
        key = f"{role}_token_id"
        if key in inner and key not in outer:
            found.statements.append(Statement("config.json", spec.at(key), role, inner[key], True))
        else:
            found.statements.append(Statement("config.json", f"/{key}", role, outer.get(key), key in outer))
        if generation_config is not None:
            found.statements.append(
                Statement(
                    "generation_config.json", f"/{key}", role, generation_config.get(key), key in generation_config
                )
            )
        text = token_text((tokenizer_config or {}).get(f"{role}_token"))
        if text:
            found.names[role] = text
    return found


@fact("checkpoint", cost="header")
def embedding_rows(checkpoint, spec, tensors) -> int | None:
    """Rows of the token embedding as stored, else vocab_size of config.json, else None."""
    info = tensors.get(spec.embed_tensor) if spec.embed_tensor else None
    return info.shape[0] if info is not None and len(info.shape) == 2 else spec.vocab


SPECIAL = key_of(special)
