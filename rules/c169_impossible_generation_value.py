"""C169 impossible-generation-value: a value of generation_config.json that generation refuses.

Why: these values are the defaults of every request. transformers stops when it loads the model, or at the first reply;
vLLM refuses each request that does not state its own. Calibration and perplexity never read them, so the first to see
it is the first user.

Seen as:
- transformers: `has to be a strictly positive float`
- transformers: `has to be a strictly positive integer, but is`
- transformers: `must be greater than 0, but is`
- transformers: `Greedy methods (do_sample != True) without beam search do not support`
- vLLM: `top_p must be in (0, 1], got`
- vLLM: `repetition_penalty must be greater than zero, got`

Do: remove the value; or write one in its range.

False alarms: temperature 0 and top_k -1 are what vLLM takes for "greedy" and "all tokens"; transformers refuses both.

Fix safety: safe: without the value the default of the library holds, which switches the setting off.

Sources: tried with transformers 4.57 and 5.24 (load, generate); vllm-project/vllm vllm/sampling_params.py
(`_verify_args`), 0.32.
"""

import math

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, is_finite, rule
from doctor.lint.testing import tiny

FILE = "generation_config.json"
# key -> (least, most, whether the least itself is refused, whether it must be a whole number)
RANGES = {
    "temperature": (0, math.inf, True, False), "top_p": (0, 1, True, False), "min_p": (0, 1, False, False),
    "typical_p": (0, 1, True, False), "repetition_penalty": (0, math.inf, True, False), "top_k": (0, math.inf, False, True),
    "max_new_tokens": (1, math.inf, False, True), "max_length": (1, math.inf, False, True), "num_beams": (1, math.inf, False, True),
}  # fmt: skip
SAMPLED = ("temperature", "top_p", "min_p", "typical_p", "top_k")  # read only where tokens are sampled
TAKEN_BY_VLLM = {"temperature": 0, "top_k": -1}
AT_LOAD = ("max_new_tokens", "num_return_sequences", "early_stopping")  # transformers does not even load the model


@rule("C169", "error")
def impossible_generation_value(checkpoint, generation_config):
    given = generation_config or {}
    for key, value in given.items():
        if value is None or not (must := _must(given, key, value)):
            continue
        yield finding(
            _("{key} is {value!r} in generation_config.json; it must be {must}", key=key, value=_short(value), must=must),
            at=Place(FILE, pointer=f"/{key}"),
            evidence={"value": str(value)[:40]},
            fix=Fix(_("remove {key}", key=key), (RemoveJson(FILE, f"/{key}", value),)),
            severity="" if key in AT_LOAD else "warning",
            advice=_("vLLM takes it, transformers does not") if TAKEN_BY_VLLM.get(key) == value else "",
        )  # fmt: skip


def _must(given, key, value):
    """What a value must be; "" where it is that."""
    sampled = given.get("do_sample") is True
    if key == "early_stopping" and not isinstance(value, bool) and value != "never":
        return _("true, false or 'never'")
    if key == "num_return_sequences" and _number(value) and value > 1 and not sampled:
        return "" if _number(given.get("num_beams")) and given["num_beams"] > 1 else _("1 where nothing is sampled")
    if key not in RANGES or (key in SAMPLED and not sampled):
        return ""
    least, most, above, whole = RANGES[key]
    fits = is_finite(value) and (value > least if above else value >= least) and value <= most
    if fits and not (whole and value != int(value)):
        return ""
    kind = _("a whole number") if whole else _("a number")
    if most == math.inf:
        return _("{kind} above {least}", kind=kind, least=least if above else least - 1) if whole or above else kind
    return (
        _("{kind} above {least} and up to {most}", kind=kind, least=least, most=most)
        if above
        else _("{kind} from {least} to {most}", kind=kind, least=least, most=most)
    )


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value):
    return value if _number(value) else str(value)[:40]


def bad():
    case = tiny()
    case.json["generation_config.json"] |= {"do_sample": True, "temperature": 0.7, "top_p": 1.5}
    return case, "top_p is 1.5 in generation_config.json; it must be a number above 0 and up to 1"


def good():
    case = tiny()
    case.json["generation_config.json"] |= {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    return case


def more():
    """Cases whose fixes the example above does not show."""
    for values in ({"max_new_tokens": 0}, {"do_sample": True, "top_k": -1}, {"num_return_sequences": 2}):
        case = tiny()
        case.json["generation_config.json"] |= values
        yield case
