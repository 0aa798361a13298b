"""C162 generation-config-unsaveable: sampling values with do_sample false, which transformers 4 cannot save.

Why: the file loads. A library that validates strictly when it saves ends with an error after hours of quantizing, and writes no
model. Until then the values have no effect, because greedy decoding reads none of them.

Seen as:
- transformers: `GenerationConfig is invalid`
- transformers: `The generation config instance is invalid -- `.validate()` throws warnings and/or exceptions`

Do: set do_sample to true where the model is meant to be sampled, else remove the values.

False alarms: transformers 5 saves it all the same. `doctor quantize` copies the file as it is and is not affected.

Fix safety: unsafe: generation then samples where it was greedy, which is what the values are for.

Sources: vllm-project/llm-compressor issue 2412; transformers 4.57 src/transformers/generation/configuration_utils.py (validate).
"""

from doctor.lint.rule import MISSING, Fix, Place, SetJson, _, finding, listed, rule
from doctor.lint.testing import tiny

FILE = "generation_config.json"
# The value of each key at which greedy decoding does not complain of it.
NEUTRAL = {
    "temperature": (None, 1.0), "top_p": (None, 1.0), "min_p": (None,), "typical_p": (None, 1.0), "top_k": (None, 50),
    "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
}  # fmt: skip


@rule("C162", "warning")
def generation_config_unsaveable(checkpoint, generation_config):
    if generation_config is None:
        return
    stated = generation_config.get("do_sample", MISSING)
    if stated not in (MISSING, False, None):
        return
    found = {
        k: generation_config[k]
        for k, neutral in NEUTRAL.items()
        if k in generation_config and generation_config[k] not in neutral
    }
    if not found:
        return
    yield finding(
        _(
            "generation_config.json sets {values} while do_sample is {state}; transformers 4 refuses to save it",
            values=listed(f"{k} {v}" for k, v in found.items()), state=_("absent") if stated is MISSING else _("false"),
        ),
        at=Place(FILE, pointer=f"/{next(iter(found))}"),
        evidence={k: v if isinstance(v, (int, float)) else str(v) for k, v in found.items()},
        fix=Fix(_("set do_sample to true"), (SetJson(FILE, "/do_sample", True, stated),), "unsafe"),
        advice=_("or remove the values: greedy decoding reads none of them"),
    )  # fmt: skip


def bad():
    case = tiny()
    case.json["generation_config.json"] |= {"do_sample": False, "temperature": 0.6, "top_p": 0.95}
    return case, (
        "generation_config.json sets temperature 0.6 and top_p 0.95 while do_sample is false; transformers 4 refuses to save it"
    )


def good():
    case = tiny()
    case.json["generation_config.json"] |= {"do_sample": True, "temperature": 0.6}
    return case
