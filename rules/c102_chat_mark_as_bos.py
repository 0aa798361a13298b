"""C102 chat-mark-as-bos: a Qwen model names a chat mark as its BOS token.

Why: <|im_start|> opens a turn. As BOS it stands before every text, so a chat begins with two turn starts and plain text
begins inside a turn: calibration rows and answers change. The value comes from a work-around that went round for a
crash in ExLlamaV2.

Do: take the vendor's value, <|endoftext|>; in tokenizer_config.json the vendor has null.

False alarms: vendors of other families that do use a chat mark as BOS (SmolLM2) are left alone.

Fix safety: safe; it restores what Qwen ships, and only where the tokenizer has that token.

Sources: QwenLM/Qwen3 docs/source/getting_started/concepts.md: the BOS token "should not be set to <|im_start|>";
history of dolphin-2.9.2-qwen2-72b, where 151644 was set and later changed back to 151643.
"""

from doctor.lint.rule import TURN_MARKS, Fix, Place, SetJson, finding, rule
from doctor.lint.testing import only_in, tiny

VENDOR = "<|endoftext|>"


@rule("C102", "warning")
def chat_mark_as_bos(checkpoint, special, tokenizer):
    if not special.model_type.startswith("qwen"):
        return
    vendor = tokenizer.ids.get(VENDOR)
    for file in ("config.json", "generation_config.json"):
        stated = special.of(file, "bos")
        for number in stated.ids:
            token = tokenizer.token(number)
            if token in TURN_MARKS:
                fix = Fix(
                    f'set "bos_token_id": {vendor} ({VENDOR}, as Qwen ships it)',
                    (SetJson(file, stated.pointer, vendor, stated.value),),
                )
                yield finding(
                    f"bos_token_id {number} in {file} is {token}, a chat mark; Qwen's is {VENDOR}"
                    + (f" = {vendor}" if vendor is not None else ""),
                    at=Place(file, pointer=stated.pointer, note=f"{token} opens a turn"),
                    evidence={"id": number, "token": token},
                    fix=fix if vendor is not None else None,
                )
    name = special.names.get("bos")
    if name in TURN_MARKS:
        yield finding(
            f"bos_token in tokenizer_config.json is {name}, a chat mark; Qwen ships null",
            at=Place("tokenizer_config.json", pointer="/bos_token"),
            evidence={"token": name},
            fix=Fix(
                'set "bos_token": null',
                (
                    SetJson(
                        "tokenizer_config.json",
                        "/bos_token",
                        None,
                        checkpoint.value("tokenizer_config.json")["bos_token"],
                    ),
                ),
            ),
        )


def bad():
    case = good()
    case.config["bos_token_id"] = 5
    case.json["generation_config.json"]["bos_token_id"] = 5
    return case, "bos_token_id 5 in config.json is <|im_start|>, a chat mark; Qwen's is <|endoftext|> = 4"


def good():
    case = tiny(only_in("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", why="the marks are those of Qwen"))
    vocabulary = case.json["tokenizer.json"]["model"]["vocab"]
    for number, token in ((4, VENDOR), (5, "<|im_start|>")):
        old = next(t for t, i in vocabulary.items() if i == number)
        del vocabulary[old]
        vocabulary[token] = number
    case.config["bos_token_id"] = 4
    case.json["generation_config.json"]["bos_token_id"] = 4
    case.json["tokenizer_config.json"]["bos_token"] = None
    return case
