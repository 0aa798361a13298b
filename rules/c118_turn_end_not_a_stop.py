"""C118 turn-end-not-a-stop: chat template ends a turn with a token that stops nothing.

Why: the model was trained to end its turn with this token. The engine generates on after it: the user's next turn, or the
same answer again, up to the limit. Quantization is then blamed for it.

Do: add the token's id to eos_token_id in generation_config.json.

False alarms: a base model that carries a chat template and was never trained on it. So only checkpoints whose
generation_config.json sets how to sample are judged.

Fix safety: safe: a stop token is added and none is removed.

Sources: transformers src/transformers/generation/utils.py; vllm-project/vllm vllm/config/model.py,
try_get_generation_config; meta-llama/Meta-Llama-3-8B-Instruct, whose first generation_config.json lacked <|eot_id|>.
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, rule, turn_end
from doctor.lint.testing import tiny

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample")


@rule("C118", "warning", certainty="likely", implied_by=("C103", "C105", "C106", "C109"))
def turn_end_not_a_stop(checkpoint, special, tokenizer, generation_config, chat_template):
    if not chat_template or not any((generation_config or {}).get(key) for key in SAMPLING):
        return
    named = {f"{role}_token": name for role, name in special.names.items() if name}
    token = turn_end(chat_template, tokenizer.special, named)
    end = tokenizer.ids.get(token)
    stated = special.of("generation_config.json", "eos")
    if not stated.ids:
        stated = special.of("config.json", "eos")
    if end is None or not stated.ids or end in stated.ids:
        return
    value = [*stated.ids, end]
    yield finding(
        _(
            "the chat template ends a turn with {token} = {id}; {file} stops at {stops}",
            token=token,
            id=end,
            file=stated.file,
            stops=", ".join(map(str, stated.ids)),
        ),
        at=Place(stated.file, pointer=stated.pointer, note=_("{token} = {id} is not among them", token=token, id=end)),
        evidence={"turn_end": end, "stops": str(list(stated.ids))},
        fix=Fix(
            _('set "{key}": {value}', key="eos_token_id", value=value),
            (SetJson(stated.file, stated.pointer, value, stated.value if stated.stated else MISSING),),
        ),
    )


TURNS = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\\n' + message['content'] + '<|end|>' + '\\n' }}"
    "{% endfor %}"
)


def with_turns(stops):
    case = tiny()
    for entry in case.json["tokenizer.json"]["added_tokens"]:
        if entry["content"] == "<|end|>":
            break
    else:
        vocab = case.json["tokenizer.json"]["model"]["vocab"]
        old = next(t for t, i in vocab.items() if i == 7)
        vocab["<|end|>"] = vocab.pop(old)
        case.json["tokenizer.json"]["added_tokens"].append({"id": 7, "content": "<|end|>", "special": True})
    case.files["chat_template.jinja"] = TURNS.encode()
    case.json["generation_config.json"] |= {"eos_token_id": stops, "do_sample": True, "temperature": 0.7}
    return case


def bad():
    return with_turns(2), "the chat template ends a turn with <|end|> = 7; generation_config.json stops at 2"


def good():
    return with_turns([2, 7])
