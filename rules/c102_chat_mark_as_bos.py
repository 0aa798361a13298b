"""C102 chat-mark-as-bos: BOS token of a Qwen model is a chat token (<|im_start|>).

Why: <|im_start|> opens a turn. As BOS it comes before every text, so a chat begins with two turn starts and plain text
begins inside a turn: calibration rows and answers change. The value comes from a widely shared work-around for a crash
in ExLlamaV2.

Do: use the vendor's value, <|endoftext|>; in tokenizer_config.json the vendor has null.

False alarms: other vendors do use a chat token as BOS. Their families are not reported, nor is a model of Qwen's class
with the tokenizer of SmolLM, whose first token is <|endoftext|>.

Fix safety: safe: it restores what Qwen ships, and only where the tokenizer has that token.

Sources: QwenLM/Qwen3 docs/source/getting_started/concepts.md: the BOS token "should not be set to <|im_start|>";
history of dolphin-2.9.2-qwen2-72b, where 151644 was set and later changed back to 151643.
"""

from doctor.lint.rule import TURN_MARKS, Fix, Place, SetJson, _, finding, rule
from doctor.lint.testing import only_in, tiny

VENDOR = "<|endoftext|>"


@rule("C102", "warning")
def chat_mark_as_bos(checkpoint, special, tokenizer):
    if not special.model_type.startswith("qwen"):
        return
    vendor = tokenizer.ids.get(VENDOR)
    if vendor == 0:
        return  # SmolLM's tokenizer begins with the chat tokens; in Qwen's they follow the ordinary ones
    for file in ("config.json", "generation_config.json"):
        stated = special.of(file, "bos")
        for number in stated.ids:
            token = tokenizer.token(number)
            if token in TURN_MARKS:
                fix = Fix(
                    _(
                        'set "{key}": {value} ({token}, as Qwen ships it)',
                        key="bos_token_id",
                        value=vendor,
                        token=VENDOR,
                    ),
                    (SetJson(file, stated.pointer, vendor, stated.value),),
                )
                yield finding(
                    _(
                        "bos_token_id {id} in {file} is {token}, a chat token; Qwen's is {vendor} = {right}",
                        id=number,
                        file=file,
                        token=token,
                        vendor=VENDOR,
                        right=vendor,
                    )
                    if vendor is not None
                    else _(
                        "bos_token_id {id} in {file} is {token}, a chat token; Qwen's is {vendor}",
                        id=number,
                        file=file,
                        token=token,
                        vendor=VENDOR,
                    ),
                    at=Place(file, pointer=stated.pointer, note=_("{token} opens a turn", token=token)),
                    evidence={"id": number, "token": token},
                    fix=fix if vendor is not None else None,
                )
    name = special.names.get("bos")
    if name in TURN_MARKS:
        yield finding(
            _("bos_token in tokenizer_config.json is {token}, a chat token; Qwen ships null", token=name),
            at=Place("tokenizer_config.json", pointer="/bos_token"),
            evidence={"token": name},
            fix=Fix(
                _('set "{key}": {value}', key="bos_token", value="null"),
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
    return case, "bos_token_id 5 in config.json is <|im_start|>, a chat token; Qwen's is <|endoftext|> = 4"


def good():
    case = tiny(only_in("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", why="the chat tokens are those of Qwen"))
    vocabulary = case.json["tokenizer.json"]["model"]["vocab"]
    for number, token in ((4, VENDOR), (5, "<|im_start|>")):
        old = next(t for t, i in vocabulary.items() if i == number)
        del vocabulary[old]
        vocabulary[token] = number
    case.config["bos_token_id"] = 4
    case.json["generation_config.json"]["bos_token_id"] = 4
    case.json["tokenizer_config.json"]["bos_token"] = None
    return case
